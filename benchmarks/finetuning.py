"""Cost of fine-tuning and of evaluating every granularity at once, against the library's ways.

    python benchmarks/finetuning.py --output finetuning.json

Training steps (forward and backward of the loss) on a model of 12 layers with exits 4, 8, 12 and 4 dimensions, random
weights, 128 queries of 16 and 128 documents of 64 tokens. Times are taken in turns on one model, the peak memory of
each case in a process of its own:

- `plain`: MultipleNegativesRankingLoss at the full model alone.
- `ours`: MultigranularLoss over 12 cells; `ours, aligned`: with alignment.
- `library`: Matryoshka2dLoss over the same dimensions, and over the same exits: it offers no choice of layers, so
  `layer_weighting` gives those that are no exit a weight of 0 - their cost stays; `library, 2 of 11 layers` draws two
  prior layers for each step (`n_layers_per_step=2`), which is the number of ours, though not the same ones.
- `plain, cached` and `ours, cached`: GradCache with mini-batches of 32; the library has no such form over layers.

Evaluation (`--evaluate QUERIES DOCUMENTS`): time of `GranularityEvaluator` over all cells, against encoding the texts
once for each exit with `encode_query` and `encode_document`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    Matryoshka2dLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from tqdm import tqdm

from m3bert_hf import GranularityEvaluator, M3BertConfig, M3BertModel, MultigranularLoss, build_sentence_transformer
from m3bert_hf.retrieval_task import load_retrieval_task
from m3bert_hf.sentence_transformer import M3BertSentenceTransformer, M3BertTransformer


CASES = (
    "plain",
    "ours",
    "ours, aligned",
    "library",
    "library, 2 of 11 layers",
    "plain, cached",
    "ours, cached",
)
ROOT = Path(__file__).resolve().parent.parent


def build(hidden: int) -> M3BertSentenceTransformer:
    """Make a model with random weights; the tokenizer of the shipped checkpoint is not asked for."""
    import tempfile

    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "m3bert-nano")
    dims = sorted({32, 64, 128, hidden})
    config = M3BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=12,
        num_attention_heads=hidden // 64,
        exit_layers=[4, 8, 12],
        matryoshka_dimensions=dims,
    )
    with tempfile.TemporaryDirectory() as folder:
        M3BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module = M3BertTransformer(folder)
        return M3BertSentenceTransformer(modules=[module, Pooling(hidden)])


def make_loss(case: str, model: M3BertSentenceTransformer) -> Any:
    """Return the loss of a case."""
    dims = model.transformers_model.config.matryoshka_dimensions
    if case.endswith("cached"):
        inner: Any = CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)
    else:
        inner = MultipleNegativesRankingLoss(model)
    if case.startswith("plain"):
        return inner
    if case.startswith("ours"):
        return MultigranularLoss(model, inner, align_weight=1.0 if "aligned" in case else 0.0)
    if case == "library":
        options: dict = {"n_layers_per_step": -1, "layer_weighting": lambda i: float(i in (4, 8))}
    else:
        options = {"n_layers_per_step": 2}
    return Matryoshka2dLoss(model, inner, dims, n_dims_per_step=-1, kl_temperature=0, **options)


def step(loss: Any, columns: list[dict], bf16: bool) -> float:
    """Run forward and backward once and return the seconds."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = loss([dict(column) for column in columns], None)
    value.backward()
    return time.perf_counter() - start


def set_up(hidden: int, batch: int) -> tuple[M3BertSentenceTransformer, list[dict]]:
    """Make the model, with gradients allocated, and the columns."""
    model = build(hidden).train()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.transformers_model.config.vocab_size
    columns = [
        {
            "input_ids": torch.randint(5, vocabulary, (batch, tokens), generator=generator),
            "attention_mask": torch.ones(batch, tokens, dtype=torch.long),
        }
        for tokens in (16, 64)
    ]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, columns


def memory(case: str, hidden: int, batch: int, bf16: bool) -> float:
    """Return the MiB that a step needs at its peak above what was there before."""
    model, columns = set_up(hidden, batch)
    loss = make_loss(case, model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step(loss, columns, bf16)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def seconds(cases: list[str], hidden: int, batch: int, repeats: int, bf16: bool) -> dict[str, float]:
    """Return the best time of each case; they take turns on one model, so that all meet the same machine."""
    model, columns = set_up(hidden, batch)
    losses = {case: make_loss(case, model) for case in cases}
    best: dict[str, float] = {}
    for _ in range(repeats + 1):
        for case, loss in losses.items():
            best[case] = min(best.get(case, float("inf")), step(loss, columns, bf16))
    return best


def evaluation(model: str, queries: Path, documents: Path) -> dict[str, float]:
    """Time the evaluation of all cells, and encoding once for each exit."""
    task = load_retrieval_task(queries, documents)
    encoder = build_sentence_transformer(model, max_seq_length=64)
    evaluator = GranularityEvaluator.from_task(task, batch_size=128, measure_speed=False)
    start = time.perf_counter()
    report = evaluator.evaluate(encoder)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    for exit_layer in encoder.exit_layers:
        encoder.encode_query(task.queries, exit_layer=exit_layer, batch_size=128)
        encoder.encode_document(task.documents, exit_layer=exit_layer, batch_size=128)
    once_for_each = time.perf_counter() - start
    return {
        "cells": len(report.rows),
        "documents": len(task.documents),
        "evaluator_seconds": ours,
        "encoding_seconds_in_it": evaluator.encoding_seconds,
        "encode_once_for_each_exit_seconds": once_for_each,
        "ratio": ours / once_for_each,
    }


def main() -> None:
    """Run each case in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="with bfloat16 autocast")
    parser.add_argument("--evaluate", type=Path, nargs=2, metavar=("QUERIES", "DOCUMENTS"))
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "m3bert-nano"), help="of --evaluate")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(memory(options.one, options.hidden, options.batch, options.bf16))
        return
    content: dict[str, Any] = {"hidden": options.hidden, "batch": options.batch, "rows": []}
    if options.evaluate:
        content["evaluation"] = evaluation(options.model, *options.evaluate)
        print(json.dumps(content["evaluation"], indent=1))
    else:
        best = seconds(options.cases, options.hidden, options.batch, options.repeats, options.bf16)
        shape = ["--hidden", str(options.hidden), "--batch", str(options.batch)]
        for case in tqdm(options.cases, desc="memory"):
            command = [sys.executable, __file__, "--one", case, *shape, *(["--bf16"] if options.bf16 else [])]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            extra = float(result.stdout.strip().splitlines()[-1])
            content["rows"].append({"case": case, "seconds": best[case], "extra_mib": extra})
        print("| loss | s a step | of the first | extra memory (MiB) |\n| --- | ---: | ---: | ---: |")
        for row in content["rows"]:
            ratio = row["seconds"] / content["rows"][0]["seconds"]
            print(f"| {row['case']} | {row['seconds']:.2f} | {ratio:.2f} | {row['extra_mib']:,.0f} |")
    if options.output:
        options.output.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
