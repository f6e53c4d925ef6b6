"""Retrieval quality of an m3BERT model at every (exit, dimension), by exact search."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from .text_data import read_json_lines


def exact_search(
    queries: torch.Tensor, documents: torch.Tensor, top_k: int, query_block: int = 512, document_block: int = 65_536
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the documents with the highest cosine similarity, in blocks of bounded memory.

    Args:
        queries: Vectors [queries, width], not necessarily normalised.
        documents: Vectors [documents, width].
        top_k: Hits per query; all documents if there are fewer.
        query_block: Queries scored at once.
        document_block: Documents scored at once.

    Returns:
        Similarities and document indices, both [queries, top_k], best first.

    Raises:
        ValueError: If the widths differ or `top_k` is not positive.
    """
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(f"Queries of width {queries.shape[1]} cannot search documents of width {documents.shape[1]}.")
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")
    queries = torch.nn.functional.normalize(queries.float(), dim=1)
    documents = torch.nn.functional.normalize(documents.float(), dim=1)
    top_k = min(top_k, len(documents))
    found_scores, found_indices = [], []
    for query_part in queries.split(query_block):
        scores = query_part.new_empty(len(query_part), 0)
        indices = torch.empty(len(query_part), 0, dtype=torch.long, device=queries.device)
        for start in range(0, len(documents), document_block):
            block = query_part @ documents[start : start + document_block].T
            best = block.topk(min(top_k, block.shape[1]), dim=1)
            scores = torch.cat([scores, best.values], dim=1)
            indices = torch.cat([indices, best.indices + start], dim=1)
            scores, order = scores.topk(min(top_k, scores.shape[1]), dim=1)
            indices = indices.gather(1, order)
        found_scores.append(scores)
        found_indices.append(indices)
    return torch.cat(found_scores), torch.cat(found_indices)


def retrieval_metrics(
    hits: torch.Tensor, relevant: Sequence[set[int]], cutoffs: Iterable[int] = (10, 100)
) -> dict[str, torch.Tensor]:
    """Score ranked hits.

    Args:
        hits: Document indices [queries, k], best first.
        relevant: Indices of the right documents of each query.
        cutoffs: Values of k for MRR@k and Recall@k.

    Returns:
        For each metric, its value for each query [queries].
    """
    is_right = torch.tensor(
        [[hit in right for hit in row] for row, right in zip(hits.tolist(), relevant, strict=True)],
        dtype=torch.float32,
    ).reshape(hits.shape)
    found = is_right.cumsum(dim=1)
    reciprocal = 1.0 / torch.arange(1, hits.shape[1] + 1)
    counts = torch.tensor([len(right) for right in relevant]).clamp(min=1)
    metrics = {}
    for k in cutoffs:
        metrics[f"mrr@{k}"] = (is_right * (found == 1) * reciprocal)[:, :k].sum(dim=1)
        metrics[f"recall@{k}"] = found[:, min(k, hits.shape[1]) - 1] / counts
    return metrics


def evaluate_retrieval(
    model: SentenceTransformer,
    queries: Sequence[str],
    documents: Sequence[str],
    relevant: Sequence[set[int]],
    groups: Sequence[str] | None = None,
    exit_layers: Sequence[int] | None = None,
    dimensions: Sequence[int] | None = None,
    cutoffs: Sequence[int] = (10, 100),
    batch_size: int = 256,
) -> list[dict[str, Any]]:
    """Measure MRR and Recall at every (exit, dimension); each exit encodes once, dimensions are slices of it.

    Args:
        model: An `M3BertSentenceTransformer`, or a `SentenceTransformer` saved by one.
        queries: Texts.
        documents: Texts.
        relevant: Indices of the right documents of each query; documents of the same text count as right too.
        groups: Group of each query, such as its language, for figures by group.
        exit_layers: `None` means all of the model's.
        dimensions: `None` means the model's matryoshka dimensions.
        cutoffs: Values of k.
        batch_size: Texts encoded at once.

    Returns:
        One row for each cell: `exit_layer`, `truncate_dim`, the metrics averaged over queries, and with groups
        `groups`, the same for each group with its number of `queries`.

    Raises:
        ValueError: If there are no queries or documents, an exit or a dimension does not exist, or the lists do not
            fit one another.
    """
    if not len(queries) or not len(documents):
        raise ValueError(f"Nothing to evaluate: {len(queries)} queries, {len(documents)} documents.")
    if len(relevant) != len(queries) or (groups is not None and len(groups) != len(queries)):
        raise ValueError("`relevant` and `groups` need one entry for each query.")
    config = model.transformers_model.config
    exit_layers = list(config.exit_layers if exit_layers is None else exit_layers)
    dimensions = list(config.matryoshka_dimensions if dimensions is None else dimensions)
    for exit_layer in exit_layers:
        config.resolve_exit_layer(exit_layer)
    for dimension in dimensions:
        config.resolve_truncate_dim(dimension)
    same_text: dict[str, set[int]] = {}
    for index, text in enumerate(documents):
        same_text.setdefault(text, set()).add(index)
    relevant = [set().union(*(same_text[documents[i]] for i in right)) for right in relevant]

    rows = []
    for exit_layer in tqdm(exit_layers, desc="Exits"):
        options: dict[str, Any] = {
            "exit_layer": exit_layer,
            "batch_size": batch_size,
            "convert_to_tensor": True,
            "show_progress_bar": False,
            "truncate_dim": max(dimensions),
        }
        query_vectors = model.encode_query(list(queries), **options)
        document_vectors = model.encode_document(list(documents), **options)
        for dimension in dimensions:
            _, hits = exact_search(query_vectors[:, :dimension], document_vectors[:, :dimension], max(cutoffs))
            metrics = retrieval_metrics(hits.cpu(), relevant, cutoffs)
            row: dict[str, Any] = {"exit_layer": exit_layer, "truncate_dim": dimension}
            row.update({name: values.mean().item() for name, values in metrics.items()})
            if groups is not None:
                row["groups"] = {
                    group: {
                        "queries": len(members),
                        **{name: values[members].mean().item() for name, values in metrics.items()},
                    }
                    for group in sorted(set(groups))
                    for members in [[i for i, g in enumerate(groups) if g == group]]
                }
            rows.append(row)
    return rows


def load_retrieval_task(
    query_file: str | Path, document_file: str | Path
) -> tuple[list[str], list[str], list[set[int]], list[str]]:
    """Read a task: documents with `id` and `document`; queries with `query` and the `id` of the right document.

    Returns:
        Queries, documents, indices of the right documents, and the languages of the queries.

    Raises:
        ValueError: If a query names a document that is not there.
    """
    places: dict[str, int] = {}
    documents: list[str] = []
    for row in read_json_lines(document_file):
        places[str(row["id"])] = len(documents)
        documents.append(row["document"])
    queries, relevant, languages = [], [], []
    for row in read_json_lines(query_file):
        if str(row["id"]) not in places:
            raise ValueError(f"Query {row['query']!r} of {query_file} names {row['id']!r}, not in {document_file}.")
        queries.append(row["query"])
        relevant.append({places[str(row["id"])]})
        languages.append(row.get("lang", ""))
    return queries, documents, relevant, languages


def format_grid(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Return a Markdown table of one metric: exits down, dimensions across."""
    exits = sorted({row["exit_layer"] for row in rows})
    dimensions = sorted({row["truncate_dim"] for row in rows})
    cells = {(row["exit_layer"], row["truncate_dim"]): row[metric] for row in rows}
    lines = [f"| {metric} | " + " | ".join(f"d={d}" for d in dimensions) + " |"]
    lines.append("| --- |" + " ---: |" * len(dimensions))
    for exit_layer in exits:
        values = " | ".join(f"{cells[exit_layer, d]:.3f}" for d in dimensions)
        lines.append(f"| exit {exit_layer} | {values} |")
    return "\n".join(lines)


__all__ = ["evaluate_retrieval", "exact_search", "format_grid", "load_retrieval_task", "retrieval_metrics"]
