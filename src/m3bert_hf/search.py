"""Search by cosine similarity: exact in bounded memory, in two steps, over quantised vectors, or with faiss."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers.util import quantize_embeddings
from torch import Tensor


Vectors = Tensor | np.ndarray
Precision = Literal["float32", "int8", "binary"]


def _checked(queries: Vectors, documents: Vectors, top_k: int) -> tuple[Tensor, Vectors, int]:
    queries = torch.as_tensor(queries)
    if queries.ndim != 2 or documents.ndim != 2:
        raise ValueError(f"Expected two matrices, got shapes {tuple(queries.shape)} and {tuple(documents.shape)}.")
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(f"Queries of width {queries.shape[1]} cannot search documents of width {documents.shape[1]}.")
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")
    if not len(documents):
        raise ValueError("There are no documents to search.")
    return F.normalize(queries.float(), dim=1), documents, min(top_k, len(documents))


def _blocks(documents: Vectors, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield the documents as unit vectors [size, width], one block at a time: files in memory stay where they are."""
    for start in range(0, len(documents), size):
        # copy: a memory-mapped file may be read-only, of which torch makes no tensor without a warning
        part = documents[start : start + size]
        block = torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part
        yield start, F.normalize(block.to(device).float(), dim=1)


_GROUP = 16


def _merge(scores: Tensor, indices: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Bring a block's similarities into the best so far, reading each of them once.

    A value enters only if it beats the worst of the best so far, and then the maximum of its group of 16 does. After
    the first blocks few groups are left in each row, and the selection costs less than the product before it; `topk`
    over whole rows costs as much as the product.

    Args:
        scores: Best so far [queries, k], descending, -inf where there is none yet.
        indices: Their places [queries, k].
        values: Similarities of a block [queries, documents of the block].
        start: Place of the block's first document.
    """
    k = scores.shape[1]
    groups = values.shape[1] // _GROUP
    whole = values[:, : groups * _GROUP].view(len(values), groups, _GROUP)
    greatest = whole.amax(dim=2)
    entering = int((greatest > scores[:, -1:]).sum(dim=1).max()) if groups else 0
    if entering * _GROUP >= values.shape[1] // 4:
        best = values.topk(min(k, values.shape[1]), dim=1)
        found, places = best.values, best.indices
    else:
        # The groups of greatest maximum hold every value that can enter; rows with fewer of them take some in vain.
        chosen = greatest.topk(entering, dim=1, sorted=False).indices
        offsets = torch.arange(_GROUP, device=values.device)
        places = (chosen[:, :, None] * _GROUP + offsets).flatten(1)
        rest = torch.arange(groups * _GROUP, values.shape[1], device=values.device).expand(len(values), -1)
        places = torch.cat([places, rest], dim=1)
        found = values.gather(1, places)
    if not found.shape[1]:
        return scores, indices
    best = torch.cat([scores, found], dim=1).topk(k, dim=1)
    return best.values, torch.cat([indices, places + start], dim=1).gather(1, best.indices)


def exact_search(
    queries: Vectors, documents: Vectors, top_k: int, query_block: int = 1024, document_block: int = 16_384
) -> tuple[Tensor, Tensor]:
    """Find the documents with the highest cosine similarity, in blocks of bounded memory.

    Beyond queries, documents and the result, memory is one block of documents in float32 and
    `query_block * document_block` similarities, whatever the number of documents.

    Args:
        queries: Vectors [queries, width], not necessarily normalised.
        documents: Vectors [documents, width], on any device or as a (memory-mapped) array of any float type.
        top_k: Hits per query; all documents if there are fewer.
        query_block: Queries scored at once.
        document_block: Documents scored at once.

    Returns:
        Similarities and document indices, both [queries, top_k], best first, on the queries' device.

    Raises:
        ValueError: If the widths differ, there are no documents, or `top_k` is not positive.
    """
    queries, documents, top_k = _checked(queries, documents, top_k)
    device = queries.device
    scores = torch.full((len(queries), top_k), -torch.inf, device=device)
    indices = torch.zeros((len(queries), top_k), dtype=torch.long, device=device)
    buffer = torch.empty(
        min(query_block, len(queries)), min(document_block, len(documents)), dtype=torch.float32, device=device
    )
    for start, block in _blocks(documents, document_block, device):
        for first in range(0, len(queries), query_block):
            rows = slice(first, first + query_block)
            part = queries[rows]
            similarities = torch.mm(part, block.T, out=buffer.flatten()[: len(part) * len(block)].view(len(part), -1))
            scores[rows], indices[rows] = _merge(scores[rows], indices[rows], similarities, start)
    return scores, indices


def two_step_search(
    queries: Vectors,
    documents: Vectors,
    top_k: int,
    shortlist_dim: int = 64,
    shortlist: int | None = None,
    query_block: int = 1024,
    document_block: int = 65_536,
) -> tuple[Tensor, Tensor]:
    """Search with the first dimensions, then order what was found by all of them; one stored vector serves both.

    Args:
        queries: Vectors [queries, width].
        documents: Vectors [documents, width].
        top_k: Hits per query.
        shortlist_dim: Dimensions of the first step; one that the model was trained for.
        shortlist: Documents per query that the second step orders; `None` means 10 times `top_k`.
        query_block: Queries scored at once.
        document_block: Documents scored at once in the first step.

    Returns:
        Similarities at full width and document indices, both [queries, top_k], best first.

    Raises:
        ValueError: As for [`exact_search`]; if `shortlist_dim` is not within 1 and the width, or `shortlist` is below
            `top_k`.
    """
    unit, documents, top_k = _checked(queries, documents, top_k)
    if not 1 <= shortlist_dim <= unit.shape[1]:
        raise ValueError(f"shortlist_dim={shortlist_dim} must be within 1 and the width {unit.shape[1]}.")
    shortlist = min(10 * top_k if shortlist is None else shortlist, len(documents))
    if shortlist < top_k:
        raise ValueError(f"shortlist={shortlist} must be at least top_k={top_k}.")
    _, candidates = exact_search(
        unit[:, :shortlist_dim], documents[:, :shortlist_dim], shortlist, query_block, document_block
    )
    scores, indices = [], []
    # Candidates are gathered: blocks keep [queries, shortlist, width] small.
    size = max(1, query_block * document_block // (shortlist * unit.shape[1] * 8))
    for part, places in zip(unit.split(size), candidates.split(size), strict=True):
        flat = places.flatten()
        rows = (
            documents[flat.cpu().numpy()]
            if isinstance(documents, np.ndarray)
            else documents[flat.to(documents.device)]
        )
        vectors = torch.as_tensor(rows).to(part.device).float().view(*places.shape, -1)
        similarities = torch.einsum("qw,qcw->qc", part, F.normalize(vectors, dim=-1))
        best, order = similarities.topk(top_k, dim=1)
        scores.append(best)
        indices.append(places.gather(1, order))
    return torch.cat(scores), torch.cat(indices)


def overlap(found: Tensor, reference: Tensor) -> float:
    """Return the share of a reference search's hits that another search found, averaged over queries.

    Args:
        found: Document indices [queries, k].
        reference: Document indices [queries, k'], such as those of [`exact_search`].

    Raises:
        ValueError: If the numbers of queries differ.
    """
    if len(found) != len(reference):
        raise ValueError(f"{len(found)} queries cannot be compared with {len(reference)}.")
    return (reference[:, :, None] == found[:, None, :]).any(dim=2).float().mean().item()


def bytes_per_vector(width: int, precision: Precision) -> int:
    """Return the bytes that a stored vector takes.

    Raises:
        ValueError: If the precision does not exist.
    """
    sizes = {"float32": 4 * width, "int8": width, "binary": -(-width // 8)}
    if precision not in sizes:
        raise ValueError(f"precision={precision!r} does not exist: choose one of {sorted(sizes)}.")
    return sizes[precision]


def through_precision(documents: Tensor, precision: Precision) -> Tensor:
    """Return unit vectors as an index that stores them in a precision would give them back [documents, width].

    `int8` keeps 256 steps between the least and the greatest value of each dimension; `binary` keeps signs. Queries
    stay in float32, as they are never stored. Codes are those of sentence-transformers' `quantize_embeddings`.

    Raises:
        ValueError: If the precision does not exist.
    """
    bytes_per_vector(1, precision)
    unit = F.normalize(documents.float(), dim=1)
    if precision == "float32":
        return unit
    if precision == "binary":
        packed = quantize_embeddings(unit.cpu().numpy(), precision="ubinary")
        bits = np.unpackbits(packed, axis=1)[:, : unit.shape[1]]
        return torch.from_numpy(bits).to(unit.device).float() * 2 - 1
    values = unit.cpu().numpy()
    ranges = np.stack([values.min(axis=0), values.max(axis=0)])
    # A dimension that never changes has no range to divide.
    ranges[1] = np.maximum(ranges[1], ranges[0] + 1e-6)
    codes = quantize_embeddings(values, precision="int8", ranges=ranges)
    steps = (ranges[1] - ranges[0]) / 255
    return torch.from_numpy((codes.astype(np.float32) + 128) * steps + ranges[0]).to(unit.device)


def faiss_index(documents: Vectors, factory: str = "Flat", block: int = 65_536) -> Any:
    """Build a faiss index over unit vectors, for inner products; on all GPUs where faiss has some.

    Args:
        documents: Vectors [documents, width].
        factory: faiss's index factory string: `"Flat"` is exact, `"IVF4096,PQ32"`, `"HNSW32"`, ... approximate.
        block: Documents added at once.

    Raises:
        ImportError: If faiss is not installed.
        ValueError: If there are no documents.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("This needs faiss: pip install faiss-cpu (or faiss-gpu-cu12).") from error
    if not len(documents):
        raise ValueError("There are no documents to search.")
    index = faiss.index_factory(int(documents.shape[1]), factory, faiss.METRIC_INNER_PRODUCT)
    if getattr(faiss, "get_num_gpus", lambda: 0)():
        index = faiss.index_cpu_to_all_gpus(index)
    if not index.is_trained:
        # faiss learns cells and codes from a sample; its own limit is 256 points for each of them.
        sample = np.random.default_rng(0).permutation(len(documents))[:1_000_000]
        index.train(
            np.concatenate([b.numpy() for _, b in _blocks(documents[np.sort(sample)], block, torch.device("cpu"))])
        )
    for _, part in _blocks(documents, block, torch.device("cpu")):
        index.add(part.numpy())
    return index


def faiss_search(queries: Vectors, index: Any, top_k: int) -> tuple[Tensor, Tensor]:
    """Search a faiss index of [`faiss_index`].

    Returns:
        Similarities and document indices, both [queries, top_k], best first; -1 where an approximate index found less.

    Raises:
        ValueError: If the widths differ or `top_k` is not positive.
    """
    if queries.shape[1] != index.d:
        raise ValueError(f"Queries of width {queries.shape[1]} cannot search an index of width {index.d}.")
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")
    unit = F.normalize(torch.as_tensor(queries).float().cpu(), dim=1)
    scores, indices = index.search(unit.numpy(), min(top_k, index.ntotal))
    return torch.from_numpy(scores), torch.from_numpy(indices)


__all__ = [
    "bytes_per_vector",
    "exact_search",
    "faiss_index",
    "faiss_search",
    "overlap",
    "through_precision",
    "two_step_search",
]
