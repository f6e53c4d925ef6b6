import pytest
import torch
from conftest import tiny_batch, tiny_config

from m3bert_hf import M3BertModel
from m3bert_hf.prepacking import prepack_weights
from m3bert_hf.repetition_m3bert import RepeatedTokens


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch):
    monkeypatch.setattr(RepeatedTokens, "fewest", 8)


@pytest.fixture
def selected(monkeypatch):
    """The shapes that were selected, `None` for those that could not be."""
    found = []
    select = RepeatedTokens.select

    def spy(self, states):
        states = select(self, states)
        found.append(None if states is None else tuple(states.shape))
        return states

    monkeypatch.setattr(RepeatedTokens, "select", spy)
    return found


def model_and_batch(**fields):
    torch.manual_seed(0)
    config = tiny_config(position_embedding_type="rotary", vocab_size=12, **fields)
    ids, mask = tiny_batch(config, lengths=(11, 7, 9, 1))
    return M3BertModel(config).eval(), ids, mask


def without(monkeypatch, function):
    """Call a function as if no token were repeated."""
    with monkeypatch.context() as patch:
        patch.setattr(RepeatedTokens, "find", lambda ids: None)
        return function()


@pytest.mark.parametrize("shape", [(40,), (4, 10), (2, 5, 4)])
def test_selected_rows_stand_for_all(shape):
    ids = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(0))
    states = torch.randn(7, 3)[ids]
    repeated = RepeatedTokens.find(ids)
    rows = repeated.select(states)
    assert rows.shape == (len(ids.unique()), 3)
    assert torch.equal(repeated.spread(rows), states)
    states[-1] += 1.0
    assert repeated.select(states) is None, "one place differs"


def test_little_repetition_is_left_alone():
    assert RepeatedTokens.find(torch.zeros(7, dtype=torch.long)) is None
    assert RepeatedTokens.find(torch.arange(40)) is None
    assert RepeatedTokens.find(torch.arange(40) % 33) is None
    assert RepeatedTokens.find(torch.arange(40) % 31) is not None


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("unpad", [False, True])
@torch.no_grad()
def test_states_are_those_without(prepacked, padded, unpad, selected, monkeypatch):
    model, ids, mask = model_and_batch(unpad_inputs=unpad, num_key_value_heads=2)
    mask = mask if padded else torch.ones_like(mask)
    if prepacked:
        if not torch.backends.mkldnn.is_available():
            pytest.skip("torch without oneDNN")
        # Tiny matrices are not packed otherwise.
        monkeypatch.setattr("m3bert_hf.prepacking._MANY_TOKENS", 1)
        prepack_weights(model)
    run = lambda: model(ids, attention_mask=mask, output_exits=True).exit_hidden_states  # noqa: E731
    expected = without(monkeypatch, run)
    assert not selected
    found = run()
    tokens = ids[mask.bool()] if padded and unpad else ids
    assert selected == [(len(tokens.unique()), 32)], "in the first layer and in no other"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_differs_from_place_to_place_is_multiplied_at_every_place(selected, monkeypatch):
    model, ids, mask = model_and_batch()
    noise = torch.randn(*ids.shape, 32)
    model.embeddings.register_forward_hook(lambda module, inputs, output: output + noise)
    model.config.unpad_inputs = False
    found = model(ids, attention_mask=mask).last_hidden_state
    assert selected == [None]
    expected = without(monkeypatch, lambda: model(ids, attention_mask=mask).last_hidden_state)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("what", ["hook", "forward", "adapter"])
@torch.no_grad()
def test_what_is_more_than_a_linear_layer_sees_every_token(what, selected):
    model, ids, _ = model_and_batch()
    seen, attention = [], model.layers[0].self_attn
    plain = attention.k_proj

    class Adapter(torch.nn.Module):
        def forward(self, inputs):
            seen.append(inputs.shape)
            return plain(inputs)

    if what == "hook":
        plain.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    elif what == "forward":
        plain.forward = lambda inputs: seen.append(inputs.shape) or torch.nn.functional.linear(inputs, plain.weight)
    else:
        attention.k_proj = Adapter()
    model(ids)
    assert seen == [(*ids.shape, 32)] and not selected


def test_layers_that_are_compiled_by_themselves_keep_one_graph(selected):
    model, ids, _ = model_and_batch()
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        selected.clear()
        torch.compiler.reset()
        for layer in model.layers:
            layer.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert not selected


def test_states_on_another_device_are_all_multiplied():
    ids = torch.zeros(40, dtype=torch.long)
    assert RepeatedTokens.find(ids).select(torch.zeros(40, 3, device="meta")) is None


def test_not_for_training_learned_positions_and_embeddings(selected):
    model, ids, _ = model_and_batch()
    model(ids)
    with torch.no_grad():
        model(inputs_embeds=model.embeddings.word_embeddings(ids))
        model.train()(ids)
        M3BertModel(tiny_config(vocab_size=12)).eval()(ids)
    assert not selected
