"""Time and memory of a pretraining step: the released loss, ours, and models that train one granularity only.

    python benchmarks/pretraining.py --output pretraining.json --picture pretraining.png

Base size (12 layers, hidden 768, vocabulary 250,002), random weights, 15% of the tokens labelled. A step is forward
and backward, without the optimizer, which is the same for all. Each case runs in a process of its own:

- `released`: the published objective, 12 cross entropies over dense logits of every position, written plainly.
- `ours`: `M3BertForMaskedLM(labels=...)`, the same objective; `ours, k=1`: each labelled token at one granularity
  drawn at random; `ours, one granularity`: at (12, 768) alone.
- `single`: the same backbone with one decoder, masked-only logits and `torch.nn.functional.cross_entropy`.
- `modernbert`: transformers' ModernBERT of the same depth, width and vocabulary, with masked-only logits
  (`sparse_prediction=True`).

Cases marked "kept" run with `m3bert_hf.throughput.keep_freed_memory()`, as `python -m m3bert_hf pretrain` does on a
CPU: the C library keeps freed memory instead of returning it to the system, which otherwise clears every page of the
gradients again in each step.

Extra memory is the peak of head and loss, forward and backward on given states, beyond weights and their gradients:
of the process (which on a CPU holds what the C library did not return, and the code that oneDNN generates for each
size of product), and of the tensors alone.
The matrix rate is that of 2048 x 2048 products in the same dtype, measured in the same process; the loss's share of it
counts 6 operations for each (scored token, class, dimension) against the whole time of head and loss. The rate of the
matrix products alone counts those that ran, by their shapes.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from m3bert_hf import M3BertConfig, M3BertForMaskedLM
from m3bert_hf.loss_m3bert import MLMLossOptions, multigranular_mlm_loss
from m3bert_hf.throughput import keep_freed_memory, matrix_rate


CASES = ("released", "ours", "ours, k=1", "ours, one granularity", "single", "modernbert")
KEPT = ("released", "ours", "ours, k=1", "single", "modernbert")
SHAPES = ((8, 64), (4, 512))
LABELLED = 0.15


def released_loss(states, labels, model) -> torch.Tensor:
    """Sum of mean cross entropies over dense logits at every position, as the authors' release computes it."""
    total = 0.0
    for state in states:
        for width in model.config.matryoshka_dimensions:
            features = model.head(state[..., :width])
            logits = F.linear(features, model.decoder.weight[:, :width], model.decoder.bias)
            total = total + F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    return total


def single_loss(states, labels, model) -> torch.Tensor:
    """Mean cross entropy of the deepest, widest granularity over logits of the labelled positions."""
    chosen = labels != -100
    logits = model.decoder(model.head(states[-1][chosen]))
    return F.cross_entropy(logits.float(), labels[chosen])


def our_loss(states, labels, model) -> torch.Tensor:
    """The loss that `M3BertForMaskedLM` computes, from given states."""
    config = model.config
    return multigranular_mlm_loss(
        states,
        labels,
        model.head,
        model.decoder,
        config.exit_layers,
        config.matryoshka_dimensions,
        options=model.loss_options,
    ).loss


def memory_peak(device: str, work: Callable[[], None]) -> int:
    """Return the bytes by which `work` exceeds what was held before it, at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def tensor_peak(work: Callable[[], None]) -> int:
    """Return the most bytes of tensors that were allocated during `work` and existed at one time, on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def seconds(device: str, work: Callable[[], None], repeats: int) -> float:
    """Return the shortest of several times of `work`."""
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def product_rate(work: Callable[[], None]) -> float:
    """Return the operations a second of the matrix products within `work`."""
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        work()
    # Which of the inputs are the factors.
    factors = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0, "mkldnn::_linear_pointwise": 0}
    operations = time_spent = 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.key in factors:
            left, right = event.input_shapes[factors[event.key] :][:2]
            # oneDNN's second factor is transposed.
            columns = right[0] if event.key.startswith("mkldnn") else right[-1]
            operations += 2.0 * event.count * math.prod(left) * columns
            time_spent += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6
    return operations / time_spent


def measure(case: str, dtype_name: str, batch: int, tokens: int, repeats: int, kept: bool) -> dict:
    """Measure one case in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kept:
        keep_freed_memory()
    dtype = getattr(torch, dtype_name)
    if device == "cpu":
        # A case that does not fit must fail by itself instead of making the system look for a process to end.
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (int(free * 0.95), int(free * 0.95)))
    torch.manual_seed(0)
    config = M3BertConfig(max_position_embeddings=tokens)
    if case == "modernbert":
        from transformers import ModernBertConfig, ModernBertForMaskedLM

        model = ModernBertForMaskedLM(
            ModernBertConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                tie_word_embeddings=False,
                sparse_prediction=True,
                pad_token_id=1,
            )
        )
    else:
        model = M3BertForMaskedLM(config)
        if case == "ours, k=1":
            model.loss_options = MLMLossOptions(stochastic_granularities=1)
        elif case == "ours, one granularity":
            model.loss_options = MLMLossOptions(granularities=[(12, 768)])
    model.to(device).train()
    ids = torch.randint(4, config.vocab_size, (batch, tokens), device=device)
    labels = torch.full_like(ids, -100)
    chosen = torch.randperm(ids.numel(), device=device)[: round(LABELLED * ids.numel())]
    labels.view(-1)[chosen] = ids.view(-1)[chosen]
    mask = torch.ones_like(ids)
    loss_of = {"released": released_loss, "single": single_loss}.get(case, our_loss)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            if case in ("released", "single"):
                outputs = model.model(ids, mask, output_exits=True)
                loss = loss_of(outputs.exit_hidden_states, labels, model)
            else:
                loss = model(ids, mask, labels=labels).loss
        loss.backward()

    result = {"case": case, "dtype": dtype_name, "batch": batch, "tokens": tokens, "kept": kept}
    result["labelled"] = len(chosen)
    result["matrix_rate"] = matrix_rate(torch.device(device), dtype)
    if case != "modernbert":
        width = config.hidden_size
        states = [torch.randn(batch, tokens, width, device=device, requires_grad=True) for _ in config.exit_layers]

        def head_and_loss() -> None:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of(states, labels, model)
            loss.backward()

        def clean() -> None:
            model.zero_grad(set_to_none=True)
            for state in states:
                state.grad = None

        extra = memory_peak(device, head_and_loss)
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        # With kept memory, what was freed before is not part of the peak.
        if not kept:
            result["extra_bytes"] = max(extra - gradients, 0)
            if device == "cpu" and case != "released":
                clean()
                result["tensor_bytes"] = tensor_peak(head_and_loss) - gradients
        clean()
        result["loss_seconds"] = seconds(device, lambda: (clean(), head_and_loss()), repeats)
        if case == "ours":
            clean()
            operations = 6 * len(chosen) * config.vocab_size * 3 * sum(config.matryoshka_dimensions)
            result["loss_rate"] = operations / result["loss_seconds"]
            result["product_rate"] = product_rate(head_and_loss)
        clean()
    step()
    result["step_seconds"] = seconds(device, step, repeats)
    return result


def table(results: list[dict]) -> str:
    """Format the results, each shape and dtype against the released loss and the single decoder of its own run."""
    lines = [
        "| batch | dtype | memory | case | step, s | released / this | this / single | head + loss, s | extra, MiB "
        "| of tensors |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def find(case, dtype, like):
        keys = ("batch", "tokens", "kept")
        same = (r for r in results if r["case"] == case and r["dtype"] == dtype and "step_seconds" in r)
        return next((r["step_seconds"] for r in same if all(r[k] == like[k] for k in keys)), None)

    for r in results:
        cells = [f"{r['batch']} x {r['tokens']}", r["dtype"], "kept" if r["kept"] else "", r["case"]]
        if "step_seconds" not in r:
            lines.append(f"| {' | '.join([*cells, 'does not fit', '', '', '', '', ''])} |")
            continue
        released, single = find("released", "float32", r), find("single", r["dtype"], r)
        cells.append(f"{r['step_seconds']:.2f}")
        cells.append(f"{released / r['step_seconds']:.1f}" if released else "")
        cells.append(f"{r['step_seconds'] / single:.2f}" if single else "")
        cells.append(f"{r['loss_seconds']:.2f}" if "loss_seconds" in r else "")
        cells += [f"{r[key] / 2**20:.0f}" if key in r else "" for key in ("extra_bytes", "tensor_bytes")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _drawn(result: dict, shape: tuple[int, int], dtype: str) -> bool:
    return (result["batch"], result["tokens"], result["dtype"], result["kept"]) == (*shape, dtype, False)


def draw(results: list[dict], picture: Path) -> None:
    """Draw step times as bars, a panel for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted({(r["batch"], r["tokens"]) for r in results}, key=lambda s: s[0] * s[1])
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.2 * len(shapes), 3.2), squeeze=False, layout="constrained")
    for axis, shape in zip(axes[0], shapes, strict=True):
        cases = [c for c in CASES if any(r["case"] == c for r in results)]
        for offset, dtype in enumerate(dtypes):
            found = {r["case"]: r for r in results if _drawn(r, shape, dtype)}
            values = [found.get(case, {}).get("step_seconds", 0.0) for case in cases]
            # A case that is not among the results was not run; one without a time was, and had no room.
            labels = [f"{v:.1f}" if v else "does not fit" * (c in found) for c, v in zip(cases, values, strict=True)]
            places = [i + (offset - 0.5) * 0.38 for i in range(len(cases))]
            bars = axis.barh(places, values, height=0.36, label=dtype)
            axis.bar_label(bars, labels, padding=2, fontsize=7)
        axis.set_yticks(range(len(cases)), cases)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel("seconds a step (forward and backward)")
        axis.set_title(f"{shape[0]} x {shape[1]} tokens", fontsize=10)
        axis.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Run every case in its own process; print a table, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--picture", type=Path, help="PNG file")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=[f"{b}x{t}" for b, t in SHAPES], help="such as 8x64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    results = []
    plan = [
        (shape, dtype, case, kept)
        for shape in options.shapes
        for dtype in options.dtypes
        for kept in ([False] if torch.cuda.is_available() else [False, True])
        for case in options.cases
        if not kept or case in KEPT
    ]
    for shape, dtype, case, kept in tqdm(plan, desc="cases"):
        batch, tokens = map(int, shape.split("x"))
        # The released loss takes minutes; it is compared in float32, as published.
        if case == "released" and dtype != "float32":
            continue
        job = {"case": case, "dtype_name": dtype, "batch": batch, "tokens": tokens, "kept": kept}
        job["repeats"] = 1 if case == "released" and not kept else options.repeats
        command = [sys.executable, __file__, "--measure", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            results.append(json.loads(done.stdout.splitlines()[-1]))
        elif "allocate memory" in done.stderr or "out of memory" in done.stderr or "MemoryError" in done.stderr:
            results.append({"case": case, "dtype": dtype, "batch": batch, "tokens": tokens, "kept": kept})
        else:
            sys.exit(done.stderr)
        tqdm.write(json.dumps(results[-1]))
    print(table(results))
    for r in results:
        if "loss_rate" in r:
            whole, products = r["loss_rate"] / r["matrix_rate"], r["product_rate"] / r["matrix_rate"]
            name = f"ours, {r['batch']} x {r['tokens']}, {r['dtype']}{', kept' * r['kept']}"
            rate = f"{r['matrix_rate'] / 1e9:.0f} GFLOP/s"
            print(f"{name}: head and loss at {whole:.0%}, their matrix products at {products:.0%} of {rate}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
