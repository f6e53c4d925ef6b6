import pytest
import torch
from conftest import TEXTS, tiny_config

from m3bert_hf import M3BertModel, build_sentence_transformer
from m3bert_hf.__main__ import main
from m3bert_hf.deepening import deepen


@pytest.fixture
def shallow(tokenizer, tmp_path):
    """A sentence-transformers checkpoint of two layers, the pattern of its attention unfinished."""
    torch.manual_seed(1)
    config = tiny_config(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        exit_layers=[1, 2],
        global_attn_every_n_layers=3,
        position_embedding_type="rotary",
    )
    M3BertModel(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    build_sentence_transformer(tmp_path / "plain", max_seq_length=24).save_pretrained(str(tmp_path / "shallow"))
    return tmp_path / "shallow"


def test_new_exits_are_copies_of_the_old_deepest_one(shallow, tmp_path):
    before = build_sentence_transformer(shallow).encode_exits(TEXTS)
    returned = deepen(shallow, tmp_path / "deep", [3, 5])
    loaded = build_sentence_transformer(tmp_path / "deep")
    for model in (returned, loaded):
        after = model.encode_exits(TEXTS)
        assert list(after) == [1, 2, 3, 5]
        assert torch.equal(after[1], before[1]) and torch.equal(after[2], before[2])
        assert torch.equal(after[3], before[2]) and torch.equal(after[5], before[2])
    assert loaded.max_seq_length == 24
    config = loaded.transformers_model.config
    assert config.layer_types == [kind + "_attention" for kind in ("full", "sliding", "sliding", "full", "sliding")]


def test_new_layers_learn_from_the_first_step_and_their_inner_weights_follow(shallow, tmp_path):
    encoder = deepen(shallow, tmp_path / "deep", [4]).transformers_model.train()
    ids = torch.randint(4, encoder.config.vocab_size, (6, 10))
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    before = {name: weight.clone() for name, weight in encoder.layers[3].named_parameters()}
    for step in range(2):
        optimizer.zero_grad()
        encoder(ids).last_hidden_state[..., 0].tanh().mean().backward()
        moving = {name for name, weight in encoder.layers[3].named_parameters() if weight.grad.abs().max() > 0}
        assert moving == ({"self_attn.o_proj.weight", "mlp.down_proj.weight"} if step == 0 else set(before))
        optimizer.step()
    assert all(not torch.equal(weight, before[name]) for name, weight in encoder.layers[3].named_parameters())


def test_the_seed_decides_the_new_weights_and_nothing_else_is_drawn(shallow, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (deepen(shallow, tmp_path / "deep", [4], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    weights = [model.transformers_model.layers[3].self_attn.q_proj.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_command_line_and_exits_that_are_there_already(shallow, tmp_path, capsys):
    main(["deepen", str(shallow), str(tmp_path / "deep"), "--exit-layers", "3", "4"])
    assert "exits [1, 2, 3, 4]" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"must lie above the model's 2 layers.*\[1, 2\]"):
        main(["deepen", str(shallow), str(tmp_path / "deep"), "--exit-layers", "2", "4"])


def test_norm_of_the_last_exit_alone_is_refused(tokenizer, tmp_path):
    M3BertModel(tiny_config(vocab_size=len(tokenizer), exit_norm="last")).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="exit 4 would change"):
        deepen(tmp_path / "plain", tmp_path / "deep", [6])
