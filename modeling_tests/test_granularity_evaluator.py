import json

import pytest
import torch
from conftest import TEXTS
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from m3bert_hf import GranularityEvaluator, build_sentence_transformer
from m3bert_hf.__main__ import main


QUERIES = {str(i): text[:9] for i, text in enumerate(TEXTS)}
CORPUS = {str(i): text for i, text in enumerate(TEXTS)}
RELEVANT = {str(i): {str(i), str((i + 1) % len(TEXTS))} for i in range(len(TEXTS))}


def test_metrics_equal_the_library_s(sentence_model):
    evaluator = GranularityEvaluator(QUERIES, CORPUS, RELEVANT, cutoffs=(2, 4), measure_speed=False)
    report = evaluator.evaluate(sentence_model)
    cells = [(row["exit_layer"], row["truncate_dim"]) for row in report.rows]
    assert cells == [(e, d) for e in (1, 3, 4) for d in (8, 20, 32)]
    for row in report.rows:
        library = InformationRetrievalEvaluator(
            QUERIES, CORPUS, RELEVANT, mrr_at_k=[2, 4], precision_recall_at_k=[2, 4], truncate_dim=row["truncate_dim"]
        )
        with sentence_model.early_exit(row["exit_layer"]):
            expected = library(sentence_model)
        for k in (2, 4):
            assert row[f"mrr@{k}"] == pytest.approx(expected[f"cosine_mrr@{k}"], abs=1e-6)
            assert row[f"recall@{k}"] == pytest.approx(expected[f"cosine_recall@{k}"], abs=1e-6)
        assert row["ndcg@10"] == pytest.approx(expected["cosine_ndcg@10"], abs=1e-6)


def test_similarity_equals_the_library_s(sentence_model):
    first, second, scores = TEXTS, [*TEXTS[1:], "other"], [0.1, 0.7, 0.3, 0.9, 0.2, 0.5]
    report = GranularityEvaluator.from_similarity(first, second, scores, measure_speed=False).evaluate(sentence_model)
    for row in report.rows:
        library = EmbeddingSimilarityEvaluator(first, second, scores, truncate_dim=row["truncate_dim"])
        with sentence_model.early_exit(row["exit_layer"]):
            assert row["spearman"] == pytest.approx(library(sentence_model)["spearman_cosine"], abs=1e-5)


def test_all_exits_come_from_one_pass(sentence_model):
    runs = []
    for layer in sentence_model.transformers_model.layers:
        layer.register_forward_hook(lambda *_: runs.append(1))
    options = {"batch_size": 64, "measure_speed": False}
    GranularityEvaluator(QUERIES, CORPUS, RELEVANT, **options).evaluate(sentence_model)
    assert len(runs) == 4 * 2  # four layers for the queries, four for the documents
    runs.clear()
    GranularityEvaluator(QUERIES, CORPUS, RELEVANT, exit_layers=[1], **options).evaluate(sentence_model)
    assert len(runs) == 2


def test_encode_exits_is_encode_at_each_exit(sentence_model):
    sentence_model.prompts = {"query": "frage: ", "document": ""}
    for task, encode in (("query", sentence_model.encode_query), ("document", sentence_model.encode_document)):
        vectors = sentence_model.encode_exits(
            TEXTS, [3, 1], task, batch_size=4, truncate_dim=20, normalize_embeddings=True
        )
        assert list(vectors) == [3, 1]
        for layer in vectors:
            options = {"exit_layer": layer, "truncate_dim": 20, "normalize_embeddings": True}
            wanted = encode(TEXTS, convert_to_tensor=True, **options)
            torch.testing.assert_close(vectors[layer], wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="exit_layer=2"):
        sentence_model.encode_exits(TEXTS, [2])
    with pytest.raises(TypeError, match="put it in a list"):
        sentence_model.encode_exits(TEXTS[0])
    assert sentence_model.encode_exits([], [1], truncate_dim=8)[1].shape == (0, 8)


def test_a_stock_sentence_transformer_and_a_peer_give_the_same_grid(sentence_model, tmp_path):
    options = {"measure_speed": False, "cutoffs": (2,)}
    ours = GranularityEvaluator(QUERIES, CORPUS, RELEVANT, **options).evaluate(sentence_model)
    sentence_model.save_pretrained(str(tmp_path))
    stock = SentenceTransformer(str(tmp_path))
    other = GranularityEvaluator(QUERIES, CORPUS, RELEVANT, **options).evaluate(stock)
    for a, b in zip(ours.rows, other.rows, strict=True):
        assert a.pop("precision") == b.pop("precision")
        assert a == pytest.approx(b, rel=1e-5)


def test_a_peer_has_one_exit(tokenizer, tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    module = Transformer(str(tmp_path))
    peer = SentenceTransformer(modules=[module, Pooling(16)])
    report = GranularityEvaluator(QUERIES, CORPUS, RELEVANT, measure_speed=False).evaluate(peer)
    assert [(row["exit_layer"], row["truncate_dim"]) for row in report.rows] == [(2, 16)]
    assert report.rows[0]["parameters"] == sum(p.numel() for p in peer.parameters())
    with pytest.raises(ValueError, match=r"exit_layers=\[1\] do not exist"):
        GranularityEvaluator(QUERIES, CORPUS, RELEVANT, exit_layers=[1]).evaluate(peer)


def test_sizes_are_those_of_the_model_that_holds_only_these_layers(sentence_model, checkpoint):
    report = GranularityEvaluator(QUERIES, CORPUS, RELEVANT, precisions=("float32", "int8", "binary")).evaluate(
        sentence_model
    )
    for layer in (1, 3, 4):
        alone = build_sentence_transformer(checkpoint, exit_layer=layer)
        row = report.cell(layer, 20, "binary")
        assert row["parameters"] == sum(p.numel() for p in alone.parameters())
        assert row["megabytes"] == pytest.approx(row["parameters"] * 4 / 1e6)
        assert row["bytes_per_vector"] == 3
        assert row["query_p95_ms"] >= row["query_p50_ms"] > 0 and row["search_p50_ms"] > 0
        assert row["queries_per_second"] > 0 and row["documents_per_second"] > 0


def test_a_document_of_the_same_text_is_right_and_counts_once(sentence_model):
    corpus = {"a": "other", "b": TEXTS[0], "c": TEXTS[0]}
    evaluator = GranularityEvaluator(
        {"q": TEXTS[0]}, corpus, {"q": {"c"}}, cutoffs=(1,), primary_metric="recall@1", measure_speed=False
    )
    assert all(row["mrr@1"] == row["recall@1"] == 1 for row in evaluator.evaluate(sentence_model).rows)


def test_groups_average_to_the_whole(sentence_model):
    groups = dict(zip(QUERIES, ["a", "a", "b", "b", "b", "c"], strict=True))
    evaluator = GranularityEvaluator(QUERIES, CORPUS, RELEVANT, groups, [3], [8], cutoffs=(2,), measure_speed=False)
    report = evaluator.evaluate(sentence_model)
    (row,) = report.rows
    total = sum(group["queries"] * group["mrr@2"] for group in row["groups"].values()) / 6
    assert row["mrr@2"] == pytest.approx(total)
    mean = sum(row["groups"][g]["mrr@2"] for g in "ab") / 2
    assert report.group_mean(row, "mrr@2", at_least=2) == pytest.approx(mean)


def test_in_a_trainer_s_terms(sentence_model, tmp_path):
    evaluator = GranularityEvaluator.from_pairs(TEXTS, TEXTS, name="self", cutoffs=(3,), measure_speed=False)
    metrics = evaluator(sentence_model, str(tmp_path), steps=5)
    assert evaluator.primary_metric == "self_mean_mrr@3" and metrics["self_mean_mrr@3"] == 1.0
    assert metrics["self_exit3_dim20_recall@3"] == 1.0
    assert json.loads((tmp_path / "granularities_self_step5" / "grid.json").read_text())["rows"]


def test_bad_arguments_are_named(sentence_model):
    for make, message in (
        (lambda: GranularityEvaluator(QUERIES, CORPUS, {"0": {"zz"}}), "Relevant document 'zz'"),
        (lambda: GranularityEvaluator({}, CORPUS, {}), "Nothing to evaluate"),
        (lambda: GranularityEvaluator.from_pairs(["a"], []), "1 queries do not pair with 0"),
        (lambda: GranularityEvaluator.from_similarity(["a"], ["b"], [1]), "at least 2"),
        (lambda: GranularityEvaluator(QUERIES, CORPUS, RELEVANT, precisions=["int4"]), "precision='int4'"),
        (lambda: GranularityEvaluator(QUERIES, CORPUS, RELEVANT, primary_metric="f1"), "primary_metric='f1'"),
        (lambda: GranularityEvaluator(QUERIES, CORPUS, RELEVANT, exit_layers=[2])(sentence_model), "exit_layer=2"),
        (
            lambda: GranularityEvaluator(QUERIES, CORPUS, RELEVANT, truncate_dims=[99])(sentence_model),
            "truncate_dim=99",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_command(checkpoint, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"id": i, "document": t}) for i, t in enumerate(TEXTS)))
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"id": i, "query": t}) for i, t in enumerate(TEXTS)))
    files = ["--queries", str(tmp_path / "q.jsonl"), "--documents", str(tmp_path / "d.jsonl")]
    main(["evaluate", str(checkpoint), *files, "--output", str(tmp_path / "grid"), "--no-speed"])
    # Every text finds itself, whatever the model.
    printed = capsys.readouterr().out
    assert "| exit 4 | 1.000 | 1.000 | 1.000 |" in printed and "Recommended: exit 1, 8 dimensions" in printed
    assert len(json.loads((tmp_path / "grid" / "grid.json").read_text())["rows"]) == 9
    with pytest.raises(SystemExit, match="truncate_dim=999"):
        main(["evaluate", str(checkpoint), *files, "--dims", "999"])
