import pytest
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassError

from m3bert_hf import M3BertConfig


def test_defaults_are_the_released_base_model():
    config = M3BertConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (3072, 250_002, 512)
    assert config.exit_layers == [4, 8, 12]
    assert config.matryoshka_dimensions == [32, 64, 128, 768]
    assert config.is_matryoshka and config.exit_norm == "shared" and not config.tie_word_embeddings


@pytest.mark.parametrize("depth", range(1, 14))
def test_default_exits_always_reach_the_last_layer(depth):
    exits = M3BertConfig(num_hidden_layers=depth).exit_layers
    assert exits == sorted(set(exits)) and exits[-1] == depth and exits[0] >= 1


def test_released_names_are_accepted_and_readable():
    config = M3BertConfig(mrl_layers=[2, 12], mrl_dims=[16, 768], cur_dim=16)
    assert (config.exit_layers, config.matryoshka_dimensions, config.truncate_dim) == ([2, 12], [16, 768], 16)
    assert config.mrl_layers == config.exit_layers
    config.cur_dim = 32
    assert config.truncate_dim == 32
    assert "mrl_layers" not in config.to_dict()


WRONG = [
    ({"exit_layers": [1, 3]}, "must end with"),
    ({"exit_layers": [1, 5]}, "exit_layers"),
    ({"exit_layers": [0, 4]}, "exit_layers"),
    ({"exit_layers": [3, 1, 4]}, "ascending"),
    ({"exit_layers": []}, "exit_layers"),
    ({"exit_layer": 2}, r"exit_layer=2 does not exist.*\[1, 3, 4\]"),
    ({"matryoshka_dimensions": [8, 33]}, "hidden_size"),
    ({"truncate_dim": 33}, "truncate_dim=33"),
    ({"truncate_dim": 0}, "truncate_dim=0"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_attention_heads": 5}, "num_attention_heads"),
    ({"hidden_dropout": 1.5}, "hidden_dropout"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
    ({"exit_norm": "first"}, "exit_norm"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_impossible_combinations_are_refused_everywhere(fields, message, tmp_path):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config(**fields)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError), match=r"exit|must|layers|exist|absolute|expected"):
        M3BertConfig.from_pretrained(tmp_path, **fields)
    config = tiny_config()
    before = config.to_dict()
    for key, value in fields.items():
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            setattr(config, key, value)
    assert config.to_dict() == before


def test_rotary_needs_an_even_head_dimension():
    with pytest.raises((ValueError, StrictDataclassError), match="even head dimension"):
        tiny_config(hidden_size=36, matryoshka_dimensions=[36], position_embedding_type="rotary")


@pytest.mark.parametrize(
    ("overrides", "layers", "exits", "default"),
    [
        ({}, 4, [1, 3, 4], 4),
        ({"exit_layer": 3}, 3, [1, 3], 3),
        ({"num_hidden_layers": 3}, 3, [1, 3], 3),
        ({"num_hidden_layers": 3, "exit_layer": 1}, 3, [1, 3], 1),
        ({"exit_layer": 1, "num_hidden_layers": 4}, 4, [1, 3, 4], 1),
        ({"num_hidden_layers": 2, "exit_layers": [2]}, 2, [2], 2),
    ],
)
def test_depth_asked_for_at_loading(overrides, layers, exits, default, tmp_path):
    tiny_config(global_attn_every_n_layers=2).save_pretrained(tmp_path)
    config = M3BertConfig.from_pretrained(tmp_path, **overrides)
    assert (config.num_hidden_layers, config.exit_layers, config.resolve_exit_layer()) == (layers, exits, default)
    assert len(config.layer_types) == layers
    assert config.checkpoint_layers == 4
    assert M3BertConfig.from_dict(config.to_dict()).checkpoint_layers == layers


def test_cutting_a_last_normed_model_keeps_its_states_raw():
    assert tiny_config(exit_norm="last").submodel(3).exit_norm == "none"
    assert tiny_config(exit_norm="last").submodel(4).exit_norm == "last"
    assert tiny_config(exit_norm="shared").submodel(3).exit_norm == "shared"


def test_a_cut_configuration_says_why_a_deeper_exit_is_missing():
    with pytest.raises(ValueError, match="Only 3 of the checkpoint's 4 layers were loaded"):
        tiny_config().submodel(3).exit_layer = 4


def test_fields_that_depend_on_one_another_can_be_set_together():
    config = tiny_config()
    config.update({"num_hidden_layers": 2, "exit_layers": [1, 2], "exit_layer": 1})
    assert (config.num_hidden_layers, config.exit_layers, config.exit_layer) == (2, [1, 2], 1)


def test_a_saved_default_exit_cuts_nothing(tmp_path):
    tiny_config(exit_layer=1).save_pretrained(tmp_path)
    config = M3BertConfig.from_pretrained(tmp_path)
    assert (config.num_hidden_layers, config.exit_layer) == (4, 1)


def test_positions_given_at_loading_or_assignment_are_standardised(tmp_path):
    tiny_config(position_embedding_type="rotary", global_attn_every_n_layers=2).save_pretrained(tmp_path)
    stretched = {"rope_type": "linear", "factor": 4.0}
    loaded = M3BertConfig.from_pretrained(tmp_path, rope_parameters=stretched, max_position_embeddings=192)
    assigned = M3BertConfig.from_pretrained(tmp_path)
    assigned.rope_parameters = stretched
    for config in (loaded, assigned):
        assert set(config.rope_parameters) == {"full_attention", "sliding_attention"}
        assert all(p["rope_type"] == "linear" and p["factor"] == 4.0 for p in config.rope_parameters.values())
    assigned.global_attn_every_n_layers = 1
    assert set(assigned.layer_types) == {"full_attention"}
    config = tiny_config()
    config.position_embedding_type = "rotary"
    assert config.rope_parameters["full_attention"]["rope_theta"] == 160_000.0
