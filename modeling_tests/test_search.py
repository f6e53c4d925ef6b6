import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3bert_hf.search import (
    bytes_per_vector,
    exact_search,
    faiss_index,
    faiss_search,
    overlap,
    through_precision,
    two_step_search,
)


@given(
    queries=st.integers(1, 7),
    documents=st.integers(1, 30),
    top_k=st.integers(1, 12),
    query_block=st.integers(1, 4),
    document_block=st.integers(1, 9),
    kind=st.sampled_from(["torch", "half", "numpy"]),
)
def test_search_in_blocks_equals_sorting_everything(queries, documents, top_k, query_block, document_block, kind):
    torch.manual_seed(queries * 31 + documents)
    q, d = torch.randn(queries, 5), torch.randn(documents, 5).half().float()
    pool = {"torch": d, "half": d.half(), "numpy": d.numpy()}[kind]
    scores, indices = exact_search(q, pool, top_k, query_block, document_block)
    every = torch.nn.functional.cosine_similarity(q[:, None], d[None], dim=-1)
    wanted = every.sort(dim=1, descending=True)
    torch.testing.assert_close(scores, wanted.values[:, :top_k], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(every.gather(1, indices), wanted.values[:, :top_k], atol=1e-5, rtol=1e-5)


def test_vectors_in_a_file_are_searched_where_they_lie(tmp_path):
    d = torch.randn(50, 8)
    np.save(tmp_path / "d.npy", d.numpy())
    stored = np.load(tmp_path / "d.npy", mmap_mode="r")
    q = torch.randn(3, 8)
    assert torch.equal(exact_search(q, stored, 5, document_block=7)[1], exact_search(q, d, 5)[1])
    assert torch.equal(two_step_search(q, stored, 5, 4, 20)[1], two_step_search(q, d, 5, 4, 20)[1])


def test_two_steps_find_what_one_finds_where_the_shortlist_holds_it():
    torch.manual_seed(0)
    q, d = torch.randn(20, 16), torch.randn(200, 16)
    reference = exact_search(q, d, 5)
    scores, indices = two_step_search(q, d, 5, shortlist_dim=8, shortlist=200, query_block=3, document_block=16)
    torch.testing.assert_close(scores, reference[0])
    assert overlap(indices, reference[1]) == 1.0
    shares = [overlap(two_step_search(q, d, 5, 8, size)[1], reference[1]) for size in (5, 20, 100)]
    assert 0 < shares[0] < shares[1] < shares[2] <= 1
    # Whatever the shortlist, what is returned is ordered by the similarity at full width.
    scores, indices = two_step_search(q, d, 5, 8, 20)
    wanted = torch.nn.functional.cosine_similarity(q[:, None], d[indices], dim=-1)
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-5)
    assert (scores.diff(dim=1) <= 0).all()


def test_overlap_by_hand():
    assert overlap(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 9], [4, 3]])) == 0.75
    with pytest.raises(ValueError, match="1 queries cannot be compared with 2"):
        overlap(torch.ones(1, 2), torch.ones(2, 2))


def test_precisions_lose_no_more_than_their_steps():
    torch.manual_seed(0)
    d = torch.randn(300, 24)
    unit = torch.nn.functional.normalize(d, dim=1)
    assert torch.equal(through_precision(d, "float32"), unit)
    codes = through_precision(d, "int8")
    step = (unit.amax(0) - unit.amin(0)) / 255
    assert ((codes - unit).abs() <= 1.01 * step).all() and not torch.equal(codes, unit)
    assert torch.equal(through_precision(d, "binary"), torch.where(unit > 0, 1.0, -1.0))
    assert through_precision(torch.ones(4, 3), "int8").isfinite().all()
    assert [bytes_per_vector(20, p) for p in ("float32", "int8", "binary")] == [80, 20, 3]
    with pytest.raises(ValueError, match="precision='int4' does not exist"):
        through_precision(d, "int4")


def test_faiss_finds_the_same():
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    q, d = torch.randn(9, 16), torch.randn(500, 16)
    wanted = exact_search(q, d, 10)
    scores, indices = faiss_search(q, faiss_index(d, block=77), 10)
    torch.testing.assert_close(scores, wanted[0], atol=1e-5, rtol=1e-5)
    assert overlap(indices, wanted[1]) == 1.0
    approximate = faiss_search(q, faiss_index(d, "IVF4,Flat"), 10)[1]
    assert 0.2 < overlap(approximate, wanted[1]) <= 1.0
    with pytest.raises(ValueError, match="width 8"):
        faiss_search(q[:, :8], faiss_index(d), 10)


def test_without_faiss_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        faiss_index(torch.ones(2, 2))


def test_bad_arguments_are_named():
    q = torch.ones(1, 4)
    for arguments, message in (
        ((q, torch.ones(2, 3), 1), "width 4 cannot search documents of width 3"),
        ((q, torch.ones(2, 4), 0), "top_k=0"),
        ((q, torch.ones(0, 4), 1), "no documents"),
        ((torch.ones(4), q, 1), "two matrices"),
    ):
        with pytest.raises(ValueError, match=message):
            exact_search(*arguments)
    with pytest.raises(ValueError, match="shortlist_dim=9"):
        two_step_search(q, q, 1, shortlist_dim=9)
    with pytest.raises(ValueError, match="shortlist=1 must be at least"):
        two_step_search(q, torch.ones(3, 4), 2, shortlist_dim=2, shortlist=1)


@given(rows=st.integers(1, 4), columns=st.integers(1, 900), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_blocks_of_many_documents_keep_the_best(rows, columns, k, seed):
    """Enough documents for the selection by groups; rounded, so that some are equal."""
    generator = torch.Generator().manual_seed(seed)
    q, d = torch.randn(rows, 2, generator=generator), torch.randn(columns, 2, generator=generator).round(decimals=1)
    d += (d == 0).all(dim=1, keepdim=True)
    scores, places = exact_search(q, d, k, document_block=256)
    every = torch.nn.functional.cosine_similarity(q[:, None], d[None], dim=-1)
    torch.testing.assert_close(scores, every.topk(min(k, columns), dim=1).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(every.gather(1, places), scores, atol=1e-5, rtol=1e-5)
    assert all(len(set(row)) == len(row) for row in places.tolist())
