"""What a short contrastive fine-tuning of a small model needs: its start, its batches, the rate of its embeddings.

    python examples/nano/prepare_pairs.py DATA/finetune/* --output runs/m3bert-nano/pairs
    python benchmarks/short_finetuning.py runs/m3bert-nano/pairs --output runs/short-finetuning

Every case trains the size of m3bert-nano for the same steps on the same draw of pairs, and is measured at one exit
on the validation packages. The start is random weights or `m3bert-nano-base`. The first cases train all (exit,
dimension) on batches of 256; the others, named "exit 2", train the first two layers alone on batches of 512. Prints
the tables, and how alike the vectors of 400 descriptions are before training. A stopped run goes on where it was.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import AutoConfig, AutoTokenizer, set_seed

from m3bert_hf import GranularityEvaluator, M3BertForMaskedLM, build_sentence_transformer
from m3bert_hf.finetuning import FinetuneArguments, count_tokens, finetune, load_pairs
from m3bert_hf.retrieval_task import load_retrieval_task
from m3bert_hf.whitening import whiten_embeddings


BASE = Path(__file__).resolve().parent.parent / "checkpoints" / "m3bert-nano-base"
LANGUAGE = {"batches_by": ["source", "lang"]}
WEIGHTS = [0.5, 2.0, 1.0, 1.0]
# Name: start, rate of the embeddings (the rest has 1e-3), and other fields of FinetuneArguments.
CASES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "random, mixed batches": ("random", 1e-2, {}),
    "random, one source": ("random", 1e-2, {"batches_by": ["source"]}),
    "random, one source and language": ("random", 1e-2, LANGUAGE),
    "random, one source and language, embeddings at 1e-3": ("random", 1e-3, LANGUAGE),
    "random, one source and language, embeddings at 3e-2": ("random", 3e-2, LANGUAGE),
    "pretrained, one source and language": ("pretrained", 1e-2, LANGUAGE),
    "pretrained and whitened, one source and language": ("pretrained", 1e-2, {**LANGUAGE, "whiten_embeddings": True}),
    "pretrained and whitened, one source and language, 4 neighbours": (
        "pretrained",
        1e-2,
        {**LANGUAGE, "whiten_embeddings": True, "neighbours": 4},
    ),
}
# The same for exit 2 alone, with whitened pretrained weights.
SHALLOW: dict[str, tuple[str, float, dict[str, Any]]] = {
    f"exit 2, {name}": (
        "pretrained",
        rate,
        {
            "whiten_embeddings": True,
            "granularities": ["2:32", "2:64", "2:128", "2:192"],
            **fields,
        },
    )
    for name, rate, fields in (
        ("mixed batches, temperature 0.05", 1e-2, {}),
        ("one source and language", 1e-2, LANGUAGE),
        ("temperature 0.02", 1e-2, {"contrastive_temperature": 0.02}),
        ("temperature 0.03", 1e-2, {"contrastive_temperature": 0.03}),
        ("weights 0.5, 2, 1, 1", 1e-2, {"granularity_weights": WEIGHTS}),
        (
            "weights 0.5, 2, 1, 1, temperature 0.08",
            1e-2,
            {"granularity_weights": WEIGHTS, "contrastive_temperature": 0.08},
        ),
        ("weights 0.5, 2, 1, 1, embeddings at 2e-2", 2e-2, {"granularity_weights": WEIGHTS}),
    )
}


def arguments_of(case: str, start: Path, pairs: Path) -> FinetuneArguments:
    """Return what a case trains on, and how."""
    return FinetuneArguments(
        str(start),
        [str(pairs / "pairs.jsonl.gz")],
        max_pairs=60_000,
        query_length=24,
        document_length=48,
        max_seq_length=128,
        **{**CASES, **SHALLOW}[case][2],
    )


def alikeness(model: Any, texts: list[str]) -> dict[str, Any]:
    """Return the mean cosine of texts and the effective rank of their vectors (Roy and Vetterli 2007), by exit."""
    found = {}
    for exit_layer, vectors in model.encode_exits(texts, normalize_embeddings=True).items():
        energy = torch.linalg.svdvals(vectors) ** 2
        energy = energy / energy.sum()
        rank = torch.exp(-(energy * energy.clamp_min(1e-12).log()).sum())
        found[f"exit {exit_layer}"] = {"cosine": (vectors @ vectors.T).mean().item(), "rank": rank.item()}
    return found


def measure(case: str, start: Path, options: argparse.Namespace, task: Any) -> dict[str, Any]:
    """Train a case and return MRR@10 in English and the mean of the other languages."""
    _, rate, _ = {**CASES, **SHALLOW}[case]
    training = SentenceTransformerTrainingArguments(
        output_dir=str(options.output / "model"),
        per_device_train_batch_size=512 if case in SHALLOW else 256,
        max_steps=options.steps,
        learning_rate=1e-3,
        learning_rate_mapping={"word_embeddings": rate},
        lr_scheduler_type="cosine",
        warmup_steps=20,
        bf16=True,
        batch_sampler="no_duplicates",
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    model = finetune(arguments_of(case, start, options.pairs), training)
    model.max_seq_length = 64
    report = GranularityEvaluator.from_task(
        task, exit_layers=[options.exit], truncate_dims=options.dims, measure_speed=False
    ).evaluate(model)
    return {
        str(row["truncate_dim"]): {
            "en": row["groups"]["en"]["mrr@10"],
            "others": report.group_mean(row, "mrr@10", ["en"], at_least=25),
        }
        for row in report.rows
    }


def main() -> None:
    """Measure every case that has no result yet and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="what examples/nano/prepare_pairs.py wrote")
    parser.add_argument("--output", type=Path, default=Path("runs/short-finetuning"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--exit", type=int, default=2)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--cases", help="only those whose name has this in it")
    options = parser.parse_args()
    random = options.output / "random"
    set_seed(0)
    M3BertForMaskedLM(AutoConfig.from_pretrained(BASE)).save_pretrained(random)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(random)
    starts = {"random": random, "pretrained": BASE}
    names = [options.pairs / f"validation-{kind}.jsonl.gz" for kind in ("queries", "documents")]
    task = load_retrieval_task(*names)

    file = options.output / "results.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if "start" not in found:
        found["start"] = {}
        texts = task.documents[:400]
        for name, path in starts.items():
            model = build_sentence_transformer(str(path), max_seq_length=64)
            found["start"][name] = alikeness(model, texts)
        arguments = arguments_of("pretrained and whitened, one source and language", BASE, options.pairs)
        whiten_embeddings(model[0].model, count_tokens(model, load_pairs(arguments, 0, 256), arguments))
        found["start"]["pretrained and whitened"] = alikeness(model, texts)
    chosen = {case: value for case, value in {**CASES, **SHALLOW}.items() if (options.cases or "") in case}
    for case, (start, _, _) in chosen.items():
        if case not in found:
            found[case] = measure(case, starts[start], options, task)
            print(case, found[case], flush=True)
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")

    print("| start | mean cosine by exit | effective rank by exit |\n| --- | --- | --- |")
    for name, exits in found["start"].items():
        cosines, ranks = (
            ", ".join(f"{e[key]:.{digits}f}" for e in exits.values()) for key, digits in (("cosine", 2), ("rank", 0))
        )
        print(f"| {name} | {cosines} | {ranks} |")
    heads = " | ".join(f"en, {dim} dims | others, {dim} dims" for dim in options.dims)
    print(f"\n| case | {heads} |\n| --- |" + " ---: |" * (2 * len(options.dims)))
    for case in chosen:
        cells = [f"{found[case][str(dim)][group]:.3f}" for dim in options.dims for group in ("en", "others")]
        print(f"| {case} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
