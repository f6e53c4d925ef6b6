import pytest
import torch
from conftest import tiny_batch, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from m3bert_hf import M3BertForMaskedLM, loss_m3bert
from m3bert_hf.loss_m3bert import linear_cross_entropy, select_labelled


def naive(features, weight, bias, labels):
    return torch.stack(
        [
            torch.nn.functional.cross_entropy(x @ weight[:, : x.shape[1]].T + bias, labels, reduction="sum")
            for x in features
        ]
    )


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 9),
    classes=st.integers(1, 23),
    widths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    token_block=st.integers(1, 5),
    class_block=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_equals_the_dense_float64_reference(tokens, classes, widths, token_block, class_block, seed):
    torch.manual_seed(seed)
    features = [torch.randn(tokens, d, requires_grad=True) for d in widths]
    weight = torch.randn(classes, max(widths), requires_grad=True)
    bias = torch.randn(classes, requires_grad=True)
    labels = torch.randint(0, classes, (tokens,))
    scale = torch.rand(len(widths))
    before = loss_m3bert._TOKENS_PER_BLOCK, loss_m3bert._CLASSES_PER_BLOCK
    loss_m3bert._TOKENS_PER_BLOCK, loss_m3bert._CLASSES_PER_BLOCK = token_block, class_block
    try:
        sums = linear_cross_entropy(features, weight, bias, labels)
        grads = torch.autograd.grad((sums * scale).sum(), [*features, weight, bias])
    finally:
        loss_m3bert._TOKENS_PER_BLOCK, loss_m3bert._CLASSES_PER_BLOCK = before
    doubles = [x.detach().double().requires_grad_() for x in (*features, weight, bias)]
    expected = naive(doubles[:-2], doubles[-2], doubles[-1], labels)
    wanted = torch.autograd.grad((expected * scale.double()).sum(), doubles)
    torch.testing.assert_close(sums.double(), expected, atol=1e-4, rtol=1e-5)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


def test_low_precision_errs_no_more_than_the_dense_loss_in_low_precision():
    torch.manual_seed(0)
    labels = torch.randint(0, 500, (64,))
    exact = [torch.randn(64, 32, dtype=torch.float64), torch.randn(500, 32, dtype=torch.float64) * 0.3]
    exact.append(torch.zeros(500, dtype=torch.float64))

    def gradients(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in exact]
        value = function([inputs[0]], inputs[1], inputs[2], labels)
        return [value, *torch.autograd.grad(value.sum(), inputs)]

    truth = gradients(naive, torch.float64)
    ours = gradients(linear_cross_entropy, torch.bfloat16)
    dense = gradients(naive, torch.bfloat16)
    for a, b, t in zip(ours, dense, truth, strict=True):
        assert (a.double() - t).norm() <= 1.5 * (b.double() - t).norm() + 1e-6


def test_autocast_computes_in_the_low_precision():
    torch.manual_seed(0)
    x, weight = torch.randn(8, 16), torch.randn(50, 16)
    labels = torch.randint(0, 50, (8,))
    full = linear_cross_entropy([x], weight, torch.zeros(50), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = linear_cross_entropy([x], weight, torch.zeros(50), labels)
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=2e-2, atol=0.1)


def test_blocks_bound_the_logits(monkeypatch):
    """No tensor of tokens x classes is ever made, whatever the number of granularities."""
    largest = 0
    real = loss_m3bert._logits

    def watched(*arguments):
        nonlocal largest
        result = real(*arguments)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(loss_m3bert, "_logits", watched)
    monkeypatch.setattr(loss_m3bert, "_TOKENS_PER_BLOCK", 4)
    monkeypatch.setattr(loss_m3bert, "_CLASSES_PER_BLOCK", 16)
    weight = torch.randn(200, 8, requires_grad=True)
    features = [torch.randn(30, 8, requires_grad=True) for _ in range(12)]
    linear_cross_entropy(features, weight, torch.zeros(200), torch.randint(0, 200, (30,))).sum().backward()
    assert 0 < largest <= 4 * 16


def test_parts_of_a_batch_add_up_to_the_whole():
    torch.manual_seed(0)
    model = M3BertForMaskedLM(tiny_config()).eval()
    ids, mask = tiny_batch(model.config, (9, 9, 4, 2))
    labels = torch.where(torch.rand(ids.shape) < 0.4, ids, -100).masked_fill(mask == 0, -100)
    whole = model(ids, mask, labels=labels)
    whole.loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    count = (labels != -100).sum()
    parts = 0
    for rows in (slice(0, 1), slice(1, 4)):
        part = model(ids[rows], mask[rows], labels=labels[rows], num_items_in_batch=count)
        part.loss.backward()
        parts = parts + part.granularity_losses
    torch.testing.assert_close(parts, whole.granularity_losses, atol=1e-5, rtol=1e-5)
    for got, want in zip((p.grad for p in model.parameters()), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_nothing_labelled_is_a_loss_of_zero_with_zero_gradients():
    model = M3BertForMaskedLM(tiny_config())
    ids, mask = tiny_batch(model.config)
    output = model(ids, mask, labels=torch.full_like(ids, -100))
    assert output.loss.item() == 0.0
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_labels_outside_the_vocabulary_are_named():
    assert select_labelled(torch.tensor([[-100, 3], [0, -100]]), 4)[0].tolist() == [1, 2]
    for label in (4, -1):
        with pytest.raises(ValueError, match=f"Label {label} is outside"):
            select_labelled(torch.tensor([label]), 4)
