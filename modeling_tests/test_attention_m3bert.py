import pytest
import torch
from conftest import tiny_batch, tiny_config
from torch import nn

from m3bert_hf import M3BertModel, attention_m3bert
from m3bert_hf.attention_m3bert import sdpa_attention_forward
from m3bert_hf.compat_m3bert import ALL_ATTENTION_FUNCTIONS, library_sdpa_attention_forward


def masks(tokens=33):
    lengths, places = torch.tensor([tokens, 1, 20, 32, 7])[:, None, None, None], torch.arange(tokens)
    return {
        "none": None,
        "padding": lengths > places,
        "window": ((places[:, None] - places).abs() < 5)[None, None],
        "both": (lengths > places) & (places[:, None] >= places - 5),
    }


MASKS = masks()


@pytest.fixture(autouse=True)
def _written_out(monkeypatch):
    """On any processor, in parts of two texts."""
    monkeypatch.setattr(attention_m3bert, "_has_bfloat16_products", lambda: True)
    monkeypatch.setattr(attention_m3bert, "_WEIGHTS_AT_ONCE", 2 * 4 * 33 * 33)


class Layer(nn.Module):
    num_key_value_groups, is_causal = 2, False


def states(tokens=33, batch=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, tokens, 8, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("tokens", [33, 64])
@pytest.mark.parametrize("name", MASKS)
def test_as_exact_as_the_kernel(gradients, name, tokens):
    """The error against float64 is that of SDPA's kernel within a factor of three, values and gradients."""
    upstream = torch.randn(5, tokens, 4, 8, generator=torch.Generator().manual_seed(1))

    def run(function, dtype):
        rows = [state.bfloat16().to(dtype).requires_grad_(gradients) for state in states(tokens)]
        with torch.set_grad_enabled(gradients):
            output, _ = function(Layer(), *rows, masks(tokens)[name], scaling=0.3, dropout=0.0)
        found = torch.autograd.grad(output, rows, upstream.to(dtype)) if gradients else []
        return [value.double() for value in (output, *found)]

    exact = run(library_sdpa_attention_forward, torch.float64)
    kernel = run(library_sdpa_attention_forward, torch.bfloat16)
    found = run(sdpa_attention_forward, torch.bfloat16)
    assert not torch.equal(found[0], kernel[0]), "the same kernel would make this comparison empty"
    for ours, theirs, truth in zip(found, kernel, exact, strict=True):
        assert (ours - truth).norm() < 3 * (theirs - truth).norm()


def test_texts_do_not_see_how_many_there_are():
    query, key, value = (state.bfloat16() for state in states())
    together = sdpa_attention_forward(Layer(), query, key, value, MASKS["padding"], scaling=0.3)[0]
    for i in range(0, 5, 2):
        part = slice(i, i + 2)
        rows = (query[part], key[part], value[part])
        some = sdpa_attention_forward(Layer(), *rows, MASKS["padding"][part], scaling=0.3)[0]
        torch.testing.assert_close(some, together[part], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("change", "tokens", "batch"),
    [
        ({}, 64, 1),
        ({}, 257, 2),
        ({"dtype": torch.float32}, 33, 5),
        ({"products": False}, 33, 5),
        ({"is_causal": True}, 33, 5),
        ({"mask": torch.zeros(5, 1, 1, 33, dtype=torch.bfloat16)}, 33, 5),
        ({"mask": torch.ones(33, 33, dtype=torch.bool).tril()}, 33, 1),
    ],
)
def test_left_to_the_kernel(change, tokens, batch, monkeypatch):
    monkeypatch.setattr(attention_m3bert, "_has_bfloat16_products", lambda: change.get("products", True))
    rows = [state.to(change.get("dtype", torch.bfloat16)) for state in states(tokens, batch)]
    options = {"scaling": 0.3, "is_causal": change.get("is_causal")}
    found = sdpa_attention_forward(Layer(), *rows, change.get("mask"), **options)[0]
    assert torch.equal(found, library_sdpa_attention_forward(Layer(), *rows, change.get("mask"), **options)[0])


def test_dropout_is_that_of_the_whole_batch_with_and_without_gradients():
    """What gradient checkpointing computes twice."""
    found = []
    for gradients in (False, True):
        torch.manual_seed(0)
        rows = [state.bfloat16().requires_grad_(gradients) for state in states()]
        with torch.set_grad_enabled(gradients):
            found.append(sdpa_attention_forward(Layer(), *rows, None, scaling=0.3, dropout=0.5)[0].detach())
    assert torch.equal(*found)
    rows = [state.bfloat16() for state in states()]
    assert not torch.equal(found[0], sdpa_attention_forward(Layer(), *rows, None, scaling=0.3, dropout=0.0)[0])


@pytest.mark.parametrize("positions", ["absolute", "rotary"])
@pytest.mark.parametrize("autocast", [False, True])
def test_models_use_it_and_stay_close_to_float32(positions, autocast, monkeypatch):
    torch.manual_seed(0)
    model = M3BertModel(tiny_config(position_embedding_type=positions)).eval()
    model.config._attn_implementation = "sdpa"
    ids, mask = tiny_batch(model.config, lengths=(11, 7, 1, 6, 5))
    monkeypatch.setattr(attention_m3bert, "_FEW_TOKENS", 0)
    with torch.no_grad():
        exact = model(ids, mask).last_hidden_state[mask.bool()]
        model = model if autocast else model.bfloat16()

        def run():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return model(ids, mask).last_hidden_state[mask.bool()].float()

        found = run()
        monkeypatch.setattr(attention_m3bert, "_has_bfloat16_products", lambda: False)
        kernel = run()
    assert not torch.equal(found, kernel)
    assert (found - exact).norm() < 2 * (kernel - exact).norm()


def test_a_function_that_users_register_is_called(monkeypatch):
    called = []

    def mine(*arguments, **options):
        called.append(1)
        return library_sdpa_attention_forward(*arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", mine)
    rows = [state.bfloat16() for state in states()]
    sdpa_attention_forward(Layer(), *rows, None, scaling=0.3)
    assert called
