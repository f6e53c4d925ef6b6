import copy
import pickle

import pytest
import torch
from conftest import tiny_batch, tiny_config

from m3bert_hf import M3BertForMaskedLM, M3BertModel, prepacking
from m3bert_hf.compilation import compile_encoder
from m3bert_hf.prepacking import prepack_weights, undo_prepacking


pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
SHAPES = [(9, 9, 9, 9), (11, 7, 1), (23, 2, 2, 2, 2), (40,), (3, 3), (17, 16, 15, 14, 13, 12)]
FIELDS = [
    {},
    {"position_embedding_type": "rotary", "num_key_value_heads": 2},
    {"hidden_act": "gelu", "exit_norm": "none"},
    {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4},
]


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Tiny matrices would take the plain path."""
    monkeypatch.setattr(prepacking, "_LARGE_MATRIX", 0)


def make_model(**fields):
    torch.manual_seed(0)
    return M3BertModel(tiny_config(**fields)).eval()


@torch.inference_mode()
def exits(model, lengths=(9, 9), **options):
    ids, mask = tiny_batch(model.config, lengths)
    return model(ids, attention_mask=mask, output_exits=True, **options).exit_hidden_states


def count_products(monkeypatch):
    """Return a list that grows with every packed product."""
    products = []
    weight = prepacking._PrepackedLinear.weight
    monkeypatch.setattr(prepacking._PrepackedLinear, "weight", lambda self: products.append(self) or weight(self))
    return products


@pytest.mark.parametrize("fields", FIELDS)
def test_states_are_the_plain_ones_for_padded_and_packed_batches(fields, monkeypatch):
    model = make_model(**fields)
    expected = [exits(model, lengths) for lengths in SHAPES]
    assert prepack_weights(model) is model
    products = count_products(monkeypatch)
    for lengths, wanted in zip(SHAPES, expected, strict=True):
        for state, reference in zip(exits(model, lengths), wanted, strict=True):
            assert torch.allclose(state, reference, atol=1e-5)
    # Projections, output, gate, up and down.
    assert len(products) == 5 * 4 * len(SHAPES)


def test_low_precision_is_no_worse_than_the_plain_path():
    model = make_model()
    expected = exits(model, (17, 9, 5))
    model.to(torch.bfloat16)
    plain = exits(model, (17, 9, 5))
    try:
        prepack_weights(model)
    except RuntimeError as error:
        pytest.skip(str(error))
    for state, reference, exact in zip(exits(model, (17, 9, 5)), plain, expected, strict=True):
        assert state.dtype == torch.bfloat16
        assert (state - exact).norm() <= 1.25 * (reference - exact).norm()


def test_layers_above_the_exit_are_not_packed():
    model = prepack_weights(make_model())
    exits(model, exit_layer=3)
    packed = [layer.feed_forward.parts[0].kept is not None for layer in model.layers]
    assert packed == [True, True, True, False]


def test_weights_that_change_are_packed_anew_and_names_stay(monkeypatch):
    model = make_model()
    names = set(model.state_dict())
    prepack_weights(model)
    before = exits(model)
    products = count_products(monkeypatch)
    other = M3BertModel(tiny_config()).eval().state_dict()
    for change in (
        lambda: model.layers[1].mlp.down_proj.weight.copy_(other["layers.1.mlp.down_proj.weight"]),
        lambda: model.load_state_dict(other),
        lambda: model.double().float(),
    ):
        with torch.no_grad():
            change()
            model.layers[0].self_attn.k_proj.weight.mul_(-1)
        changed = exits(model)
        undo_prepacking(model)
        assert "feed_forward" not in vars(model.layers[0]) and set(model.state_dict()) == names
        for state, reference in zip(changed, exits(model), strict=True):
            assert torch.allclose(state, reference, atol=1e-5)
        prepack_weights(model)
    assert products and not torch.allclose(changed[-1], before[-1], atol=1e-2)


def test_dtypes_that_cannot_be_packed_take_the_plain_path(monkeypatch):
    model = prepack_weights(make_model())
    exits(model)
    expected = exits(undone(model).double())
    products = count_products(monkeypatch)
    for state, reference in zip(exits(model.double()), expected, strict=True):
        assert torch.equal(state, reference)
    assert not products and model.layers[0].feed_forward.parts[0].kept is None


def test_a_cast_there_and_back_is_seen():
    model = prepack_weights(make_model())
    exits(model)
    for _ in range(3):
        # Rounded weights may come to lie where the others did.
        model.bfloat16().float()
        for state, reference in zip(exits(model), exits(undone(model)), strict=True):
            assert torch.allclose(state, reference, atol=1e-5)


def test_weights_of_which_a_part_is_taken_are_packed_anew():
    """Parts begin at the same address and count the same changes."""
    model = prepack_weights(make_model())
    exits(model)
    for layer in model.layers:
        mlp = layer.mlp
        size = mlp.up_proj.out_features // 2
        mlp.gate_proj.weight.data = mlp.gate_proj.weight.data[:size]
        mlp.up_proj.weight.data = mlp.up_proj.weight.data[:size]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :size]
        square = layer.self_attn.o_proj.weight
        square.data = square.data.t()
    for state, reference in zip(exits(model), exits(undone(model)), strict=True):
        assert torch.allclose(state, reference, atol=1e-5)


def test_short_inputs_of_small_models_keep_what_is_packed(monkeypatch):
    monkeypatch.setattr(prepacking, "_LARGE_MATRIX", 2**18)
    model = prepack_weights(make_model())
    expected = exits(undone(model), (3, 2))
    exits(model, (20, 20, 20, 20))
    kept = [part.kept for layer in model.layers for part in layer.feed_forward.parts]
    products = count_products(monkeypatch)
    for state, reference in zip(exits(model, (3, 2)), expected, strict=True):
        assert torch.equal(state, reference)
    assert not products
    exits(model, (20, 20, 20, 20))
    again = [part.kept for layer in model.layers for part in layer.feed_forward.parts]
    assert products and all(one is two and one is not None for one, two in zip(kept, again, strict=True))


def undone(model):
    model = copy.deepcopy(model)
    undo_prepacking(model)
    return model


def test_training_autocast_and_graphs_take_the_plain_path(monkeypatch):
    model = prepack_weights(make_model())
    plain = undone(model)
    products = count_products(monkeypatch)
    ids, mask = tiny_batch(model.config)
    for each in (model, plain):
        each(ids, attention_mask=mask).last_hidden_state.square().sum().backward()
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids, attention_mask=mask)
        program = torch.export.export(model, (ids,), {"attention_mask": mask})
        assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)
        torch.compiler.reset()
        torch.compile(model, backend="eager")(ids, attention_mask=mask)
        with torch.backends.mkldnn.flags(enabled=False):
            model(ids, attention_mask=mask)
        model.train()
        model(ids, attention_mask=mask)
        model.eval()
    assert not products
    exits(model)
    assert products


def test_dropout_that_is_left_on_acts():
    model = prepack_weights(make_model(hidden_dropout=0.5))
    for layer in model.layers:
        layer.dropout.train()
    torch.manual_seed(0)
    found = exits(model)
    torch.manual_seed(0)
    for state, reference in zip(found, exits(undone(model)), strict=True):
        assert torch.allclose(state, reference, atol=1e-5)
    assert not torch.allclose(found[-1], exits(model)[-1], atol=1e-2)


@pytest.mark.parametrize("place", ["self_attn.q_proj", "mlp", "mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj"])
def test_hooks_fire(place):
    model = prepack_weights(make_model())
    exits(model)
    calls = []
    model.layers[1].get_submodule(place).register_forward_hook(lambda *_: calls.append(place))
    exits(model)
    assert calls == [place]


def test_a_feed_forward_that_is_replaced_is_used():
    model = prepack_weights(make_model())
    exits(model)
    model.layers[1].mlp = copy.deepcopy(model.layers[0].mlp)
    for state, reference in zip(exits(model), exits(undone(model)), strict=True):
        assert torch.allclose(state, reference, atol=1e-5)


def test_a_merged_adapter_is_seen():
    from peft import LoraConfig, get_peft_model

    model = prepack_weights(make_model())
    exits(model)
    config = LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    # Merging changes the weights through `.data`: no version is counted.
    merged = adapted.merge_and_unload()
    for state, reference in zip(exits(merged), exits(undone(merged)), strict=True):
        assert torch.allclose(state, reference, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_pack_their_own(duplicate, monkeypatch):
    model = prepack_weights(make_model())
    expected = exits(model)
    twin = duplicate(model)
    assert twin.layers[0].feed_forward.parts[0].kept is None
    with torch.no_grad():
        model.layers[0].mlp.gate_proj.weight.zero_()
    products = count_products(monkeypatch)
    for state, reference in zip(exits(twin), expected, strict=True):
        assert torch.allclose(state, reference, atol=1e-6)
    assert products and all(part.parent is not model.layers[0].mlp for part in products)


class Adapter(torch.nn.Module):
    """What an adapter library puts in a layer's place."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, inputs):
        return self.base_layer(inputs) + 0.5 * inputs.mean(dim=-1, keepdim=True)


@pytest.mark.parametrize("place", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_adapters_act_or_are_refused(place):
    model = make_model()
    parent, name = model.layers[2].get_submodule(place.split(".")[0]), place.split(".")[1]
    base = getattr(parent, name)
    setattr(parent, name, Adapter(base))
    expected = exits(model)
    with pytest.raises(ValueError, match=rf"{name} \(Adapter\).*merge"):
        prepack_weights(model)
    setattr(parent, name, base)
    prepack_weights(model)
    exits(model)
    setattr(parent, name, Adapter(base))
    for state, reference in zip(exits(model), expected, strict=True):
        assert torch.allclose(state, reference, atol=1e-5)


def test_packed_in_one_mode_and_used_in_another():
    prepacking._fault.cache_clear()
    model = make_model()
    ids, mask = tiny_batch(model.config)
    with torch.inference_mode():
        expected = prepack_weights(model)(ids, attention_mask=mask).last_hidden_state.clone()
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, expected)


def test_models_around_the_encoder(sentence_model, monkeypatch):
    texts = ["the quick brown fox jumps over the lazy dog", "le chat noir", ""] * 4
    expected = sentence_model.encode(texts, exit_layer=3, truncate_dim=20)
    assert prepack_weights(sentence_model) is sentence_model
    products = count_products(monkeypatch)
    found = sentence_model.encode(texts, exit_layer=3, truncate_dim=20)
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)
    assert products
    prepack_weights(M3BertForMaskedLM(tiny_config()))
    with pytest.raises(ValueError, match="Linear holds no m3BERT encoder"):
        prepack_weights(torch.nn.Linear(2, 2))


def test_compilation_and_prepacking_exclude_each_other():
    model = prepack_weights(make_model())
    with pytest.raises(ValueError, match="undo_prepacking"):
        compile_encoder(model, warm_up=False, backend="eager")
    undo_prepacking(model)
    compile_encoder(model, warm_up=False, backend="eager")
    with pytest.raises(ValueError, match="undo_compilation"):
        prepack_weights(model)


def test_what_cannot_be_packed_is_refused_and_left_as_it_was(monkeypatch):
    with pytest.raises(ValueError, match="for a CPU, the model is on meta"):
        prepack_weights(make_model().to("meta"))
    model = make_model()
    with pytest.raises(RuntimeError, match="float64 cannot be packed here"):
        prepack_weights(model.double())
    model.float()
    prepacking._fault.cache_clear()
    product = prepacking._PrepackedLinear.__call__
    with monkeypatch.context() as patch:
        patch.setattr(prepacking._PrepackedLinear, "__call__", lambda self, x, *a: product(self, x, *a) * 1.001)
        with pytest.raises(RuntimeError, match="is off by"):
            prepack_weights(model)
    prepacking._fault.cache_clear()
    assert "feed_forward" not in vars(model.layers[0]) and "forward" not in vars(model.layers[0].self_attn.o_proj)
    exits(model)
