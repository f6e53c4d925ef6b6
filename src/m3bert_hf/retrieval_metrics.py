"""MRR, Recall and nDCG of ranked hits."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def first_ranks(
    hits: Tensor, relevant: Sequence[set[int]], text_ids: Tensor | None = None, block: int = 4096
) -> Tensor:
    """Return the rank (from 0) at which each right text of each query is found first [queries, most right texts].

    Args:
        hits: Document indices [queries, k], best first.
        relevant: Indices of the right documents of each query.
        text_ids: For each document the number of its text; documents of equal number count as one. `None` means that
            every document is a text of its own.
        block: Queries compared at once.

    Returns:
        float32; infinite where a text is not among the hits, NaN where a query has fewer right texts than others.
    """
    if text_ids is not None:
        right = [sorted({int(text_ids[i]) for i in indices}) for indices in relevant]
        hits = text_ids.to(hits.device)[hits]
    else:
        right = [sorted(indices) for indices in relevant]
    most = max(map(len, right))
    wanted = torch.full((len(right), most), -1, dtype=torch.long)
    for row, indices in enumerate(right):
        wanted[row, : len(indices)] = torch.tensor(indices)
    wanted = wanted.to(hits.device)
    ranks = []
    for part, texts in zip(hits.split(block), wanted.split(block), strict=True):
        same = part[:, None, :] == texts[:, :, None]
        rank = torch.where(same.any(dim=2), same.float().argmax(dim=2).float(), torch.inf)
        ranks.append(rank.masked_fill(texts < 0, torch.nan))
    return torch.cat(ranks).cpu()


def retrieval_metrics(
    hits: Tensor,
    relevant: Sequence[set[int]],
    cutoffs: Iterable[int] = (10, 100),
    text_ids: Tensor | None = None,
    ndcg_at: int = 10,
) -> dict[str, Tensor]:
    """Score ranked hits; relevance is binary.

    Args:
        hits: Document indices [queries, k], best first.
        relevant: Indices of the right documents of each query.
        cutoffs: Values of k for MRR@k and Recall@k.
        text_ids: See [`first_ranks`]: a duplicate of a right document's text is right, and counts once, as in the
            paper's protocol.
        ndcg_at: k of nDCG@k.

    Returns:
        For each metric, its value for each query [queries], as sentence-transformers'
        `InformationRetrievalEvaluator` defines it.

    Raises:
        ValueError: If the number of queries differs, a query has no right document, or a cutoff is not positive.
    """
    if len(hits) != len(relevant):
        raise ValueError(f"Hits of {len(hits)} queries do not fit the right documents of {len(relevant)}.")
    if not all(relevant):
        raise ValueError(f"Query {[bool(r) for r in relevant].index(False)} has no right document.")
    cutoffs = list(cutoffs)
    if min([*cutoffs, ndcg_at]) < 1:
        raise ValueError(f"Cutoffs {cutoffs} and ndcg_at={ndcg_at} must be at least 1.")
    ranks = first_ranks(hits, relevant, text_ids)
    counts = (~ranks.isnan()).sum(dim=1)
    best = ranks.nan_to_num(nan=torch.inf, posinf=torch.inf).amin(dim=1)
    metrics = {}
    for k in cutoffs:
        metrics[f"mrr@{k}"] = torch.where(best < k, 1.0 / (best + 1.0), 0.0)
        metrics[f"recall@{k}"] = (ranks < k).sum(dim=1) / counts
    gains = torch.where(ranks < ndcg_at, 1.0 / torch.log2(ranks + 2.0), 0.0).sum(dim=1)
    ideal = (1.0 / torch.log2(torch.arange(ndcg_at) + 2.0)).cumsum(dim=0)
    metrics[f"ndcg@{ndcg_at}"] = gains / ideal[counts.clamp(max=ndcg_at) - 1]
    return metrics


__all__ = ["first_ranks", "retrieval_metrics"]
