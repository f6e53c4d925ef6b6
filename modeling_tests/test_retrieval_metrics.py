import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3bert_hf.retrieval_metrics import first_ranks, retrieval_metrics


def naive(hits, relevant, k, texts):
    """MRR, Recall and nDCG written out for one query; texts maps a document to its text."""
    right = {texts[i] for i in relevant}
    seen, mrr, dcg = set(), 0.0, 0.0
    for rank, hit in enumerate(hits[:k]):
        text = texts[hit]
        if text in right and text not in seen:
            mrr = mrr or 1 / (rank + 1)
            dcg += 1 / math.log2(rank + 2)
            seen.add(text)
    ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(right))))
    return mrr, len(seen) / len(right), dcg / ideal


@given(st.data())
def test_equal_to_the_naive_reference(data):
    documents = data.draw(st.integers(1, 12))
    queries = data.draw(st.integers(1, 5))
    width = data.draw(st.integers(1, documents))
    texts = data.draw(st.lists(st.integers(0, 5), min_size=documents, max_size=documents))
    rows = [data.draw(st.permutations(range(documents)))[:width] for _ in range(queries)]
    relevant = [data.draw(st.sets(st.integers(0, documents - 1), min_size=1)) for _ in range(queries)]
    k = data.draw(st.integers(1, 14))
    for ids in (None, texts):
        got = retrieval_metrics(
            torch.tensor(rows), relevant, (k,), None if ids is None else torch.tensor(ids), ndcg_at=k
        )
        wanted = [naive(row, right, k, ids or range(documents)) for row, right in zip(rows, relevant, strict=True)]
        for name, values in zip((f"mrr@{k}", f"recall@{k}", f"ndcg@{k}"), zip(*wanted, strict=True), strict=True):
            assert got[name].tolist() == pytest.approx(list(values))


def test_ranks_by_hand():
    ranks = first_ranks(torch.tensor([[3, 1, 2], [0, 1, 2]]), [{1, 3}, {7}], block=1)
    assert ranks[0].tolist() == [1.0, 0.0] and ranks[1, 0] == math.inf and ranks[1, 1].isnan()


def test_bad_arguments_are_named():
    hits = torch.tensor([[0, 1]])
    for arguments, message in (
        ((hits, [{0}, {1}]), "1 queries do not fit"),
        ((hits, [set()]), "Query 0 has no right document"),
        ((hits, [{0}], (0,)), "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            retrieval_metrics(*arguments)
