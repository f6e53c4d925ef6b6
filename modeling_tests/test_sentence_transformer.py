import json

import numpy as np
import pytest
import torch
from conftest import TEXTS
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from transformers import BertConfig, BertModel

from m3bert_hf import M3BertSentenceTransformer, M3BertTransformer, build_sentence_transformer, early_exit


GRID = [(layer, width) for layer in (1, 3, 4) for width in (8, 20, 32)]


def pooled(model, texts, layer, width):
    """Mean of the encoder's own states: what every way of asking must give."""
    rows = []
    for text in texts:
        features = model.tokenizer(text, return_tensors="pt", truncation=True)
        with torch.no_grad():
            state = model[0].model(**features, exit_layer=layer).last_hidden_state
        rows.append(state[0].mean(dim=0)[:width])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize(("layer", "width"), GRID)
def test_every_way_of_asking_agrees(layer, width, checkpoint, sentence_model, tmp_path):
    expected = pooled(sentence_model, TEXTS, layer, width)
    sentence_model.save_pretrained(str(tmp_path))
    path = str(tmp_path)
    ways = {
        "call": sentence_model.encode(TEXTS, exit_layer=layer, truncate_dim=width),
        "query": sentence_model.encode_query(TEXTS, exit_layer=layer, truncate_dim=width),
        "document": sentence_model.encode_document(TEXTS, exit_layer=layer, truncate_dim=width),
        "build": build_sentence_transformer(checkpoint, exit_layer=layer, truncate_dim=width).encode(TEXTS),
        "config": SentenceTransformer(path, truncate_dim=width, config_kwargs={"exit_layer": layer}).encode(TEXTS),
        "model": SentenceTransformer(path, truncate_dim=width, model_kwargs={"exit_layer": layer}).encode(TEXTS),
        "stock call": SentenceTransformer(path).encode(TEXTS, exit_layer=layer, truncate_dim=width),
    }
    with early_exit(sentence_model, layer), sentence_model.truncate_embeddings(width):
        ways["context"] = sentence_model.encode(TEXTS)
    assert sentence_model.exit_layer == 4
    sentence_model[0].exit_layer = layer
    sentence_model.truncate_dim = width
    ways["attribute"] = sentence_model.encode(TEXTS)
    for name, vectors in ways.items():
        np.testing.assert_allclose(vectors, expected, atol=1e-5, err_msg=name)


def test_loading_at_an_exit_leaves_the_rest_out(checkpoint):
    for model in (
        build_sentence_transformer(checkpoint, exit_layer=3),
        SentenceTransformer(str(checkpoint), config_kwargs={"exit_layer": 3}),
        SentenceTransformer(str(checkpoint), model_kwargs={"exit_layer": 3}),
    ):
        assert len(model[0].model.layers) == 3
    with pytest.raises(ValueError, match="Only 3 of the checkpoint's 4 layers"):
        build_sentence_transformer(checkpoint, exit_layer=3).encode("a", exit_layer=4)


def test_missing_exits_and_widths_are_refused(checkpoint, sentence_model, caplog):
    for attempt in (
        lambda: sentence_model.encode("a", exit_layer=2),
        lambda: setattr(sentence_model, "exit_layer", 2),
        lambda: setattr(sentence_model[0], "exit_layer", 2),
        lambda: build_sentence_transformer(checkpoint, exit_layer=2),
        lambda: SentenceTransformer(str(checkpoint), config_kwargs={"exit_layer": 2}),
    ):
        with pytest.raises(ValueError, match=r"exit_layer=2 does not exist.*\[1, 3, 4\]"):
            attempt()
    with pytest.raises(ValueError, match="exit_layer=2"), sentence_model.early_exit(2):
        pass
    assert sentence_model.exit_layer == 4
    for attempt in (
        lambda: sentence_model.encode("a", truncate_dim=33),
        lambda: sentence_model.encode("a", truncate_dim=0),
        lambda: setattr(sentence_model, "truncate_dim", 33),
        lambda: build_sentence_transformer(checkpoint, truncate_dim=33),
    ):
        with pytest.raises(ValueError, match=r"truncate_dim=\d+ does not exist.*32.*\[8, 20, 32\]"):
            attempt()
    caplog.clear()
    assert sentence_model.encode("a", truncate_dim=9).shape == (9,)
    assert "was not trained" in caplog.text
    caplog.clear()
    sentence_model.encode("a", truncate_dim=8)
    assert "was not trained" not in caplog.text


def test_other_models_are_refused(tokenizer, tmp_path):
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=2, num_hidden_layers=1,
                         intermediate_size=8)).save_pretrained(tmp_path)  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no m3BERT encoder"):
        build_sentence_transformer(tmp_path)


def test_unit_vectors_at_every_granularity(sentence_model):
    for layer, width in GRID:
        vectors = sentence_model.encode(TEXTS, normalize_embeddings=True, truncate_dim=width, exit_layer=layer)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


def test_saved_repositories_name_stock_modules_and_reload_exactly(sentence_model, tmp_path):
    sentence_model.truncate_dim = 20
    sentence_model.exit_layer = 3
    sentence_model.save_pretrained(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert modules[0]["kwargs"] == ["exit_layer"]
    expected = sentence_model.encode(TEXTS)
    for loaded in (SentenceTransformer(str(tmp_path)), M3BertSentenceTransformer(str(tmp_path))):
        np.testing.assert_array_equal(loaded.encode(TEXTS), expected)
        assert loaded.truncate_dim == 20
    assert type(SentenceTransformer(str(tmp_path))[0]) is Transformer
    assert type(M3BertSentenceTransformer(str(tmp_path))[0]) is M3BertTransformer
    M3BertSentenceTransformer(str(tmp_path)).save_pretrained(str(tmp_path / "again"))
    np.testing.assert_array_equal(SentenceTransformer(str(tmp_path / "again")).encode(TEXTS), expected)


def test_early_exit_works_on_stock_models_and_restores(checkpoint):
    stock = SentenceTransformer(str(checkpoint))
    whole = stock.encode(TEXTS)
    with early_exit(stock, 1):
        shallow = stock.encode(TEXTS)
        with early_exit(stock, 3):
            assert stock[0].config.exit_layer == 3
        assert stock[0].config.exit_layer == 1
    assert not np.allclose(whole, shallow)
    np.testing.assert_array_equal(stock.encode(TEXTS), whole)
    with pytest.raises(RuntimeError), early_exit(stock, 1):
        raise RuntimeError
    assert stock[0].config.exit_layer is None


def test_features_of_the_library_work(checkpoint):
    model = build_sentence_transformer(checkpoint, prompts={"query": "search: ", "document": ""})
    plain = model.encode(["search: dog"])
    np.testing.assert_allclose(model.encode_query(["dog"]), plain, atol=1e-6)
    np.testing.assert_allclose(model.encode(["dog"], prompt_name="query"), plain, atol=1e-6)
    assert model.similarity(plain, plain).shape == (1, 1)
    assert model.get_embedding_dimension() == 32
    for precision, dtype, width in (("int8", np.int8, 8), ("ubinary", np.uint8, 1)):
        vectors = model.encode(TEXTS, precision=precision, truncate_dim=8, exit_layer=1)
        assert vectors.dtype == dtype and vectors.shape == (len(TEXTS), width)
    cls = build_sentence_transformer(checkpoint, pooling_mode="cls")
    features = cls.tokenizer("dog", return_tensors="pt")
    np.testing.assert_allclose(
        cls.encode("dog"), cls[0].model(**features).last_hidden_state[0, 0].detach().numpy(), atol=1e-5
    )


def test_encoding_in_several_processes_agrees(sentence_model):
    pool = sentence_model.start_multi_process_pool(["cpu", "cpu"])
    try:
        got = sentence_model.encode(TEXTS, pool=pool, exit_layer=3, truncate_dim=8, chunk_size=2)
    finally:
        sentence_model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(got, sentence_model.encode(TEXTS, exit_layer=3, truncate_dim=8), atol=1e-5)


def test_empty_and_overlong_texts_have_documented_results(sentence_model):
    empty = sentence_model.encode(["", "   "])
    assert np.isfinite(empty).all()
    np.testing.assert_allclose(empty[0], pooled(sentence_model, [""], 4, 32)[0], atol=1e-5)
    long = "dog " * 500
    cut = sentence_model.tokenizer.decode(
        sentence_model.tokenizer(long, truncation=True)["input_ids"], skip_special_tokens=True
    )
    np.testing.assert_allclose(sentence_model.encode(long), sentence_model.encode(cut), atol=1e-5)


MANY = [text[:cut] for text in TEXTS for cut in (4, 15, 60)] + [""]


@pytest.mark.parametrize("budget", [1, 30, 100, 10_000])
def test_batches_by_tokens_give_what_batches_by_texts_give(budget, sentence_model, monkeypatch):
    sizes = []
    forward = type(sentence_model).forward

    def spy(model, features, **kwargs):
        sizes.append(features["input_ids"].shape)
        return forward(model, features, **kwargs)

    monkeypatch.setattr(type(sentence_model), "forward", spy)
    expected = sentence_model.encode(MANY, exit_layer=3, truncate_dim=20, normalize_embeddings=True)
    sizes.clear()
    found = sentence_model.encode(MANY, exit_layer=3, truncate_dim=20, normalize_embeddings=True, batch_tokens=budget)
    assert np.allclose(found, expected, atol=1e-5) and found.dtype == expected.dtype
    assert all(rows * length <= budget or rows == 1 for rows, length in sizes)
    assert sum(rows for rows, _ in sizes) == len(MANY)
    # Two neighbouring batches that fit into one are one.
    assert all((a[0] + 1) * a[1] > budget for a in sizes[:-1])
    tensor = sentence_model.encode(MANY, exit_layer=3, convert_to_tensor=True, batch_tokens=budget)
    assert torch.allclose(tensor, sentence_model.encode(MANY, exit_layer=3, convert_to_tensor=True), atol=1e-5)


def test_batches_by_tokens_keep_prompts_tasks_and_precisions(checkpoint):
    model = build_sentence_transformer(checkpoint, prompts={"query": "how to "})
    by_texts, by_tokens = (model.encode_query(MANY, **option) for option in ({}, {"batch_tokens": 40}))
    assert np.allclose(by_tokens, by_texts, atol=1e-5)
    assert not np.allclose(by_tokens, model.encode(MANY), atol=1e-3)
    by_texts, by_tokens = (model.encode(MANY, precision="int8", **option) for option in ({}, {"batch_tokens": 40}))
    # The ranges are those of all vectors; rounding may go the other way.
    assert by_tokens.dtype == np.int8 and np.abs(by_tokens.astype(int) - by_texts.astype(int)).max() <= 1
    listed = model.encode(MANY, convert_to_numpy=False, batch_tokens=40)
    assert isinstance(listed, list) and listed[0].shape == (32,)
    assert model.encode("one text", batch_tokens=40).shape == (32,)
    assert len(model.encode([], batch_tokens=40)) == 0


def test_batches_by_tokens_refuse_what_they_cannot_do(sentence_model, monkeypatch):
    with pytest.raises(ValueError, match="batch_tokens=0 must be positive"):
        sentence_model.encode(MANY, batch_tokens=0)
    with pytest.raises(ValueError, match="batch_tokens=9 cannot be combined with output_value='token_embeddings'"):
        sentence_model.encode(MANY, batch_tokens=9, output_value="token_embeddings")
    with pytest.raises(ValueError, match="truncate_dim=33 does not exist"):
        sentence_model.encode(MANY, batch_tokens=9, truncate_dim=33)
    with pytest.raises(ValueError, match="cannot be combined with inputs other than texts"):
        sentence_model.encode([{"text": "one"}, {"text": "two"}], batch_tokens=9)
    monkeypatch.setattr(sentence_model, "token_batches", lambda *_, **__: pytest.fail("work before the checks"))
    with pytest.raises(ValueError, match="int4"):
        sentence_model.encode(MANY, batch_tokens=9, precision="int4")
    with pytest.raises(ValueError, match="no such prompt"):
        sentence_model.encode(MANY, batch_tokens=9, prompt_name="no such prompt")


def test_batches_by_tokens_know_what_cuts_a_text(sentence_model):
    def longest(**options):
        return max(map(len, sentence_model.token_batches([TEXTS[0] * 9] * 8, 96, **options)))

    sentence_model[0].query_length = 12
    assert longest(task="query") == 8
    assert longest() == 96 // 48
    assert longest(processing_kwargs={"text": {"max_length": 24}}) == 4
