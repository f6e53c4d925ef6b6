import json

import pytest
import torch
from conftest import TEXTS
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from m3bert_hf.__main__ import main
from m3bert_hf.evaluation import evaluate_retrieval, exact_search, format_grid, load_retrieval_task, retrieval_metrics


@given(
    queries=st.integers(1, 7),
    documents=st.integers(1, 30),
    top_k=st.integers(1, 12),
    query_block=st.integers(1, 4),
    document_block=st.integers(1, 9),
)
def test_search_in_blocks_equals_sorting_everything(queries, documents, top_k, query_block, document_block):
    torch.manual_seed(queries * 31 + documents)
    q, d = torch.randn(queries, 5), torch.randn(documents, 5)
    scores, indices = exact_search(q, d, top_k, query_block, document_block)
    every = torch.nn.functional.cosine_similarity(q[:, None], d[None], dim=-1)
    wanted = every.sort(dim=1, descending=True)
    torch.testing.assert_close(scores, wanted.values[:, :top_k], atol=1e-5, rtol=1e-5)
    assert torch.equal(indices, wanted.indices[:, :top_k])


def test_metrics_equal_the_library_s(sentence_model):
    queries = [text[:9] for text in TEXTS]
    relevant = [{i, (i + 1) % len(TEXTS)} for i in range(len(TEXTS))]
    rows = evaluate_retrieval(sentence_model, queries, TEXTS, relevant, cutoffs=(2, 4))
    assert [(row["exit_layer"], row["truncate_dim"]) for row in rows] == [
        (e, d) for e in (1, 3, 4) for d in (8, 20, 32)
    ]
    for row in rows:
        library = InformationRetrievalEvaluator(
            {str(i): q for i, q in enumerate(queries)},
            {str(i): d for i, d in enumerate(TEXTS)},
            {str(i): {str(j) for j in right} for i, right in enumerate(relevant)},
            mrr_at_k=[2, 4],
            precision_recall_at_k=[2, 4],
            truncate_dim=row["truncate_dim"],
        )
        with sentence_model.early_exit(row["exit_layer"]):
            expected = library(sentence_model)
        for k in (2, 4):
            assert row[f"mrr@{k}"] == pytest.approx(expected[f"cosine_mrr@{k}"], abs=1e-6)
            assert row[f"recall@{k}"] == pytest.approx(expected[f"cosine_recall@{k}"], abs=1e-6)


def test_metrics_by_hand():
    metrics = retrieval_metrics(torch.tensor([[3, 1, 2], [0, 1, 2]]), [{1}, {7}], cutoffs=(1, 3))
    assert metrics["mrr@1"].tolist() == [0, 0] and metrics["mrr@3"].tolist() == [0.5, 0]
    assert metrics["recall@3"].tolist() == [1, 0]


def test_a_document_of_the_same_text_is_right_too(sentence_model):
    documents = ["other", TEXTS[0], TEXTS[0]]
    rows = evaluate_retrieval(sentence_model, [TEXTS[0]], documents, [{2}], cutoffs=(1,))
    assert all(row["mrr@1"] == 1 for row in rows)


def test_groups_average_to_the_whole(sentence_model):
    groups = ["a", "a", "b", "b", "b", "c"]
    rows = evaluate_retrieval(
        sentence_model, TEXTS, TEXTS[::-1], [{len(TEXTS) - 1 - i} for i in range(6)], groups, [3], [8], (2,)
    )
    (row,) = rows
    total = sum(group["queries"] * group["mrr@2"] for group in row["groups"].values()) / 6
    assert row["mrr@2"] == pytest.approx(total)
    assert "| exit 3 |" in format_grid(rows, "mrr@2")


def test_bad_arguments_are_named(sentence_model):
    for arguments, message in (
        (([], TEXTS, []), "Nothing to evaluate"),
        ((["q"], TEXTS, []), "one entry for each query"),
        ((["q"], TEXTS, [{0}], None, [2]), "exit_layer=2"),
        ((["q"], TEXTS, [{0}], None, [1], [99]), "truncate_dim=99"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_retrieval(sentence_model, *arguments)
    with pytest.raises(ValueError, match="width 2"):
        exact_search(torch.ones(1, 2), torch.ones(1, 3), 1)
    with pytest.raises(ValueError, match="top_k=0"):
        exact_search(torch.ones(1, 2), torch.ones(1, 2), 0)


def test_command(checkpoint, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"id": i, "document": t}) for i, t in enumerate(TEXTS)))
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"id": i, "query": t}) for i, t in enumerate(TEXTS)))
    files = ["--queries", str(tmp_path / "q.jsonl"), "--documents", str(tmp_path / "d.jsonl")]
    main(["evaluate", str(checkpoint), *files, "--output", str(tmp_path / "grid.json")])
    # Every text finds itself, whatever the model.
    assert "| exit 4 | 1.000 | 1.000 | 1.000 |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "grid.json").read_text())) == 9
    (tmp_path / "q.jsonl").write_text('{"id": 77, "query": "x"}')
    with pytest.raises(ValueError, match="names 77"):
        load_retrieval_task(tmp_path / "q.jsonl", tmp_path / "d.jsonl")
