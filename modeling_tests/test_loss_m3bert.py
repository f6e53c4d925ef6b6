import importlib.util
import platform
import shutil
from itertools import accumulate

import pytest
import torch
from conftest import tiny_batch, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from m3bert_hf import M3BertForMaskedLM, loss_m3bert
from m3bert_hf.loss_m3bert import (
    MLMLossOptions,
    ScoredRows,
    draw_granularities,
    linear_cross_entropy,
    select_labelled,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of classes and several parts of rows, of uneven sizes, in every test."""
    divide(monkeypatch)


def divide(patch, room=7 / 8):
    for name, value in {"_CPU_WORKSPACE": 1, "_CPU_ROWS": 32, "_STEP": 32, "_COPIED": 4, "_ROOM": room}.items():
        patch.setattr(loss_m3bert, name, value)


def naive(features, weight, bias, rows, options):
    """The loss written out over dense logits, with autograd's gradients."""
    total, teacher = 0.0, None
    for index, (x, group) in enumerate(zip(features, rows, strict=True)):
        logits = x @ weight[:, : x.shape[1]].T + bias
        logs = logits.log_softmax(dim=1)
        hard = -logs.gather(1, group.targets[:, None])[:, 0]
        value = (1 - options.label_smoothing) * hard - options.label_smoothing * logs.mean(dim=1)
        if options.distillation_weight and index == 0:
            teacher = logs.detach()
        elif options.distillation_weight:
            expected = teacher[group.tokens]
            divergence = (expected.exp() * (expected - logs)).sum(dim=1)
            value = (1 - options.distillation_weight) * value + options.distillation_weight * divergence
        value = value + options.z_loss_weight * logits.logsumexp(dim=1).square()
        total = total + (value * group.weights).sum()
    return total


def problem(seed, counts, widths, classes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, d, generator=generator) for n, d in zip(counts, widths, strict=True)]
    weight, bias = torch.randn(classes, max(widths), generator=generator), torch.randn(classes, generator=generator)
    rows = [
        ScoredRows(
            torch.randint(0, classes, (n,), generator=generator),
            torch.rand(n, generator=generator),
            torch.randint(0, max(counts[0], 1), (n,), generator=generator),
        )
        for n in counts
    ]
    return (
        [x.to(dtype).requires_grad_() for x in features],
        *(x.to(dtype).requires_grad_() for x in (weight, bias)),
        rows,
    )


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    classes=st.integers(1, 140),
    width=st.integers(1, 80),
    smoothing=st.sampled_from([0.0, 0.1]),
    distillation=st.sampled_from([0.0, 0.3, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    upstream=st.sampled_from([1.0, 2.5]),
    room=st.sampled_from([0.0, 0.5, 7 / 8, 1.0]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_dense_float64_reference(
    dtype, counts, classes, width, smoothing, distillation, z_loss, upstream, room, seed
):
    counts = [min(counts[0] + 1, 70), *counts]
    widths = [width, *(1 + (seed + i) % width for i in range(len(counts) - 1))]
    features, weight, bias, rows = problem(seed, counts, widths, classes, dtype)
    options = MLMLossOptions(
        label_smoothing=smoothing, distillation_weight=distillation, z_loss_weight=z_loss, backend="torch"
    )
    with pytest.MonkeyPatch.context() as patch:
        divide(patch, room)
        loss, nlls, hits = linear_cross_entropy(features, weight, bias, rows, options)
    grads = torch.autograd.grad(loss * upstream, [*features, weight, bias])
    doubles = [x.detach().double().requires_grad_() for x in (*features, weight, bias)]
    expected = naive(doubles[:-2], doubles[-2], doubles[-1], rows, options)
    wanted = torch.autograd.grad(expected * upstream, doubles)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(loss.double(), expected, atol=tolerance, rtol=tolerance)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    for x, group, nll, hit in zip(doubles, rows, nlls, hits, strict=False):
        logits = x @ doubles[-2][:, : x.shape[1]].T + doubles[-1]
        dense = torch.nn.functional.cross_entropy(logits, group.targets, reduction="none")
        torch.testing.assert_close(nll.double(), dense, atol=tolerance, rtol=tolerance)
        assert torch.equal(hit, logits.argmax(dim=1) == group.targets) or classes == 1


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
@pytest.mark.parametrize("distillation", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [[32, 12], [8, 4]])
def test_any_part_may_be_frozen_and_the_decoder_wider_than_all(needed, distillation, dtype, widths):
    features, weight, bias, rows = problem(3, [40, 70], [*widths], 300)
    weight = torch.cat([weight, torch.randn(300, 40 - widths[0])], dim=1).detach()
    weight, options = (weight * 0.3).requires_grad_(), MLMLossOptions(distillation_weight=distillation)
    inputs = [(x.detach() * 0.5).requires_grad_(needed[0]) for x in features]
    inputs += [weight.requires_grad_(needed[1]), bias.requires_grad_(needed[2])]
    wanted = [x for x in inputs if x.requires_grad]
    expected = torch.autograd.grad(
        naive(inputs[:2], inputs[2], inputs[3], rows, options), wanted, materialize_grads=True
    )
    with torch.autocast("cpu", dtype=dtype, enabled=dtype.itemsize == 2):
        kind = dtype if dtype == torch.float64 else torch.float32
        moved = [x.detach().to(kind).requires_grad_(x.requires_grad) for x in inputs]
        loss, *_ = linear_cross_entropy(moved[:2], moved[2], moved[3], rows, options)
        with torch.no_grad():
            plain, *_ = linear_cross_entropy(moved[:2], moved[2], moved[3], rows, options)
    torch.testing.assert_close(plain, loss.detach(), atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad(loss, [x for x in moved if x.requires_grad])
    tolerance = 1e-5 if dtype.itemsize > 2 else 2e-2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.to(kind), atol=tolerance * b.abs().max().item(), rtol=tolerance)


def test_float16_holds_the_small_probabilities_of_a_large_vocabulary(monkeypatch):
    """Equal classes pull at their common weight as much as the label does, if 1 / 50,000 is not rounded to float16."""
    monkeypatch.setattr(loss_m3bert, "_STEP", 2048)
    features, _, _, rows = problem(4, [8], [16], 50_000)
    x = features[0].detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        # A decoder without gradient keeps nothing, and all is computed again.
        loss, *_ = linear_cross_entropy([x], torch.full((50_000, 16), 0.5), torch.zeros(50_000), rows)
    assert torch.autograd.grad(loss, x)[0].abs().max() < 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_low_precision_errs_no_more_than_the_dense_loss_in_low_precision(dtype, mixed):
    exact, weight, bias, rows = problem(0, [64, 64], [32, 8], 500, torch.float64)
    exact = [*exact, (weight * 0.3).detach(), bias.detach()]
    # Weights as small as those of one token in a large batch, which float16 cannot hold as a factor.
    rows = [ScoredRows(group.targets, group.weights * 1e-6, group.tokens) for group in rows]

    def gradients(function, kind, autocast):
        inputs = [x.detach().to(kind).requires_grad_() for x in exact]
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            value = function(inputs[:2], inputs[2], inputs[3])
        return [value, *torch.autograd.grad(value * 1e6, inputs)]

    def ours(features, weight, bias):
        return linear_cross_entropy(features, weight, bias, rows)[0]

    def dense(features, weight, bias):
        return naive(features, weight, bias, [ScoredRows(g.targets, g.weights * 1e6) for g in rows], MLMLossOptions())

    kind = torch.float32 if mixed else dtype
    truth = gradients(lambda *inputs: dense(*inputs) * 1e-6, torch.float64, False)
    got, low = gradients(ours, kind, mixed), gradients(lambda *inputs: dense(*inputs).float() * 1e-6, kind, mixed)
    assert abs(got[0].double() - truth[0]) <= 3e-4 * truth[0]
    for a, b, t in zip(got[1:], low[1:], truth[1:], strict=True):
        assert (a.double() - t).norm() <= 1.1 * (b.double() - t).norm()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_fused_backend_gives_the_same():
    features, weight, bias, rows = problem(1, [40, 20], [8, 4], 101)
    results = {}
    for backend in ("torch", "inductor"):
        loss, *_ = linear_cross_entropy(features, weight, bias, rows, MLMLossOptions(backend=backend))
        results[backend] = [loss, *torch.autograd.grad(loss, [*features, weight, bias])]
    for got, want in zip(results["inductor"], results["torch"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_the_cpu(backend, dtype):
    if backend == "inductor" and not importlib.util.find_spec("triton"):
        pytest.skip("needs Triton")
    features, weight, bias, rows = problem(1, [40, 20], [32, 16], 1001)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [x.detach().to(device, dtype).requires_grad_() for x in (*features, weight, bias)]
        moved = [ScoredRows(*(t.to(device) for t in (g.targets, g.weights, g.tokens))) for g in rows]
        options = MLMLossOptions(backend=backend if device == "cuda" else "torch")
        loss, *_ = linear_cross_entropy(inputs[:2], inputs[2], inputs[3], moved, options)
        results.append([loss.cpu(), *(g.cpu() for g in torch.autograd.grad(loss, inputs))])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def allocated(work):
    """The most bytes that torch holds at once of those that it allocates during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("mixed", [False, True])
def test_memory_grows_neither_with_granularities_nor_with_classes(monkeypatch, mixed):
    """Beside the decoder's gradient there is one workspace, which neither number moves."""
    monkeypatch.setattr(loss_m3bert, "_CPU_WORKSPACE", 2**21)
    monkeypatch.setattr(loss_m3bert, "_COPIED", 64)
    monkeypatch.setattr(loss_m3bert, "_CPU_ROWS", 64)
    extra = []
    for granularities, classes in ((1, 20_000), (12, 20_000), (12, 60_000)):
        features, weight, bias, rows = problem(0, [40] * granularities, [64] * granularities, classes)

        def work(inputs=(features, weight, bias, rows)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                linear_cross_entropy(*inputs)[0].backward()

        extra.append(allocated(work) - weight.nbytes - bias.nbytes)
    assert max(extra) <= 1.25 * 2**21 < 60_000 * 40 * 2


@given(rows=st.integers(0, 2000), size=st.integers(1, 20))
def test_parts_cover_the_rows_evenly(rows, size):
    parts = loss_m3bert._parts(rows, 16 * size)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert len(sizes) == -(-rows // (16 * size)) and max(sizes, default=0) <= 16 * size
    assert not sizes or max(sizes) - min(sizes) <= 32
    assert all(part.start % 16 == 0 for part in parts)


def test_going_backward_twice_is_refused_and_without_gradients_nothing_is_kept():
    features, weight, bias, rows = problem(0, [9], [4], 20)
    loss, *_ = linear_cross_entropy(features, weight, bias, rows)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hands them out once"):
        loss.backward()
    with torch.no_grad():
        again, *_ = linear_cross_entropy(features, weight, bias, rows)
    torch.testing.assert_close(again, loss.detach())
    assert not again.requires_grad


# ---------------------------------------------------------------- the objective in the model


def labelled(config, lengths=(11, 7, 5), share=0.5):
    ids, mask = tiny_batch(config, lengths)
    generator = torch.Generator().manual_seed(5)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < share, ids, -100)
    return ids, mask, labels.masked_fill(mask == 0, -100)


def dense_grid(model, ids, mask, labels):
    """Cross entropy of each (exit, dimension) from the logits that the model returns for it [exits, dimensions]."""
    config = model.config
    return torch.stack(
        [
            torch.stack(
                [
                    torch.nn.functional.cross_entropy(
                        model(ids, mask, exit_layer=layer, truncate_dim=d).logits.flatten(0, 1), labels.flatten()
                    )
                    for d in config.matryoshka_dimensions
                ]
            )
            for layer in config.exit_layers
        ]
    )


def test_the_default_is_the_plain_sum_over_the_grid_that_inference_shows():
    model = M3BertForMaskedLM(tiny_config()).train()
    ids, mask, labels = labelled(model.config)
    output = model(ids, mask, labels=labels)
    grid = dense_grid(model, ids, mask, labels)
    torch.testing.assert_close(output.granularity_losses, grid.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, grid.sum(), atol=1e-4, rtol=1e-5)
    predicted = model(ids, mask).logits.argmax(dim=-1)
    share = (predicted == labels)[labels != -100].float().mean()
    torch.testing.assert_close(output.granularity_accuracies[-1, -1], share)


def test_weights_and_pairs_select_and_scale():
    model = M3BertForMaskedLM(tiny_config()).train()
    ids, mask, labels = labelled(model.config)
    grid = dense_grid(model, ids, mask, labels).detach()
    model.loss_options = MLMLossOptions(granularities=[(1, 8), (4, 32)], granularity_weights=[2.0, 0.5])
    output = model(ids, mask, labels=labels)
    torch.testing.assert_close(output.loss.detach(), 2 * grid[0, 0] + 0.5 * grid[2, 2], atol=1e-4, rtol=1e-5)
    assert output.granularity_losses.isnan().sum() == 7
    model.loss_options = MLMLossOptions(reduction="sum")
    total = model(ids, mask, labels=labels)
    count = (labels != -100).sum()
    torch.testing.assert_close(total.loss.detach(), grid.sum() * count, atol=1e-2, rtol=1e-5)


def test_layers_above_the_deepest_pair_are_not_run():
    model = M3BertForMaskedLM(tiny_config()).train()
    ids, mask, labels = labelled(model.config)
    grid = dense_grid(model, ids, mask, labels).detach()
    model.loss_options = MLMLossOptions(granularities=[(1, 8), (3, 20)])
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    output = model(ids, mask, labels=labels)
    assert ran == [0, 1, 2]
    torch.testing.assert_close(output.granularity_losses[0, 0], grid[0, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.granularity_losses[1, 1], grid[1, 1], atol=1e-5, rtol=1e-5)
    assert output.granularity_losses.shape == (3, 3)
    ran.clear()
    whole = model(ids, mask, labels=labels, output_logits=True)
    assert len(ran) == 4 and whole.logits.shape == (*ids.shape, model.config.vocab_size)


def test_stochastic_granularities_have_the_full_loss_as_expectation():
    torch.manual_seed(0)
    model = M3BertForMaskedLM(tiny_config(initializer_range=0.1)).train()
    ids, mask, labels = labelled(model.config, (40, 30, 20))
    full = model(ids, mask, labels=labels)
    full.loss.backward()
    wanted = model.head.dense.weight.grad.clone()
    model.loss_options = MLMLossOptions(stochastic_granularities=2, granularity_weights=[1.0, 2.0] + [1.0] * 7)
    plain = full.granularity_losses.sum() + full.granularity_losses[0, 1]
    draws = 300
    losses, grids = [], []
    for _ in range(draws):
        output = model(ids, mask, labels=labels)
        losses.append(output.loss.detach())
        grids.append(output.granularity_losses)
    losses = torch.stack(losses)
    error = losses.std() / draws**0.5
    assert error > 0 and abs(losses.mean() - plain) < 4 * error
    grids = torch.stack(grids)
    errors = grids.std(dim=0) / draws**0.5
    assert ((grids.mean(dim=0) - full.granularity_losses).abs() < 5 * errors).all()

    model.loss_options = MLMLossOptions(stochastic_granularities=1)
    model.zero_grad()
    for _ in range(draws):
        (model(ids, mask, labels=labels).loss / draws).backward()
    got = model.head.dense.weight.grad
    assert torch.nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.97


@given(tokens=st.integers(0, 40), granularities=st.integers(1, 12), data=st.data())
@settings(max_examples=50, deadline=None)
def test_each_token_gets_different_granularities_in_balance(tokens, granularities, data):
    drawn = data.draw(st.integers(1, granularities))
    parts = draw_granularities(tokens, granularities, drawn)
    sizes = [part.numel() for part in parts]
    assert max(sizes) - min(sizes) <= 1
    counts = torch.bincount(torch.cat(parts), minlength=tokens)
    assert (counts == drawn).all() and all(part.unique().numel() == part.numel() for part in parts)


@pytest.mark.parametrize("drawn", [None, 1])
def test_distillation_leaves_the_teacher_alone(drawn):
    torch.manual_seed(0)
    model = M3BertForMaskedLM(tiny_config()).train()
    ids, mask, labels = labelled(model.config)
    plain = model(ids, mask, labels=labels).granularity_losses[-1, -1]
    model.loss_options = MLMLossOptions(
        distillation_weight=1.0, stochastic_granularities=drawn, granularities=[(1, 8), (3, 20), (4, 32)]
    )
    output = model(ids, mask, labels=labels)
    torch.testing.assert_close(output.granularity_losses[-1, -1], plain)
    # With all of the students' loss from the teacher, and students equal to it, only its own loss is left.
    model.loss_options = MLMLossOptions(distillation_weight=1.0, granularities=[(4, 32)])
    torch.testing.assert_close(model(ids, mask, labels=labels).loss.detach(), plain)


def test_evaluation_mode_leaves_the_training_options_out():
    model = M3BertForMaskedLM(tiny_config()).eval()
    ids, mask, labels = labelled(model.config)
    plain = model(ids, mask, labels=labels).loss
    model.loss_options = MLMLossOptions(
        stochastic_granularities=1, distillation_weight=0.5, label_smoothing=0.1, z_loss_weight=0.1
    )
    torch.testing.assert_close(model(ids, mask, labels=labels).loss, plain)
    assert not torch.allclose(model.train()(ids, mask, labels=labels).loss, plain)


def test_parts_of_a_batch_add_up_to_the_whole():
    torch.manual_seed(0)
    model = M3BertForMaskedLM(tiny_config()).eval()
    ids, mask, labels = labelled(model.config, (9, 9, 4, 2))
    whole = model(ids, mask, labels=labels)
    whole.loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    count = (labels != -100).sum()
    parts = accuracies = 0
    for rows in (slice(0, 1), slice(1, 4)):
        part = model(ids[rows], mask[rows], labels=labels[rows], num_items_in_batch=count)
        part.loss.backward()
        parts, accuracies = parts + part.granularity_losses, accuracies + part.granularity_accuracies
    torch.testing.assert_close(parts, whole.granularity_losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(accuracies, whole.granularity_accuracies)
    for got, want in zip((p.grad for p in model.parameters()), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_nothing_labelled_is_a_loss_of_zero_with_zero_gradients():
    model = M3BertForMaskedLM(tiny_config())
    ids, mask = tiny_batch(model.config)
    output = model(ids, mask, labels=torch.full_like(ids, -100))
    assert output.loss.item() == 0.0
    output.loss.backward()
    assert model.decoder.weight.grad is not None
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_labels_outside_the_vocabulary_are_named():
    assert select_labelled(torch.tensor([[-100, 3], [0, -100]]), 4)[0].tolist() == [1, 2]
    for label in (4, -1):
        with pytest.raises(ValueError, match=f"Label {label} is outside"):
            select_labelled(torch.tensor([label]), 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularities": [(2, 8)]}, r"Granularity \(2, 8\) does not exist: exits are \[1, 3, 4\]"),
        ({"granularity_weights": [1.0]}, "`granularity_weights` has 1 values, but there are 9"),
        ({"stochastic_granularities": 10}, "within 1 and 9, got 10"),
        ({"label_smoothing": 1.5}, "`label_smoothing` must be within"),
        ({"granularities": [(1, 8), (1, 8)]}, "without repetition"),
        ({"granularities": [(4, 8), (1, 20)], "distillation_weight": 0.3}, "the deepest granularity, \\(4, 8\\)"),
        ({"backend": "cuda"}, "`backend` must be one of"),
    ],
)
def test_bad_options_are_named(fields, message):
    model = M3BertForMaskedLM(tiny_config())
    ids, mask, labels = labelled(model.config)
    with pytest.raises(ValueError, match=message):
        model.loss_options = MLMLossOptions(**fields)
        model(ids, mask, labels=labels)


def test_the_library_that_multiplies_and_the_state_of_the_generator_do_not_matter(monkeypatch):
    features, weight, bias, rows = problem(2, [70, 20], [8, 4], 101)
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("only one library multiplies here")
    loss_m3bert._onednn_product.cache_clear()
    state, results = torch.get_rng_state(), []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(loss_m3bert, "_onednn_product", lambda: False)
        loss, *_ = linear_cross_entropy(features, weight, bias, rows)
        results.append([loss, *torch.autograd.grad(loss, [*features, weight, bias])])
        if not plain:
            assert loss_m3bert._onednn_product.cache_info().currsize == 1 and loss_m3bert._onednn_product()
    assert torch.equal(torch.get_rng_state(), state)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
