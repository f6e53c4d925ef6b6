import json
import shutil

import pytest
import torch
from conftest import TEXTS
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from m3bert_hf import (
    GranularityEvaluator,
    M3BertForMaskedLM,
    MultigranularLoss,
    build_sentence_transformer,
    export_submodel,
)
from m3bert_hf.__main__ import main


@pytest.fixture
def parent(checkpoint):
    return build_sentence_transformer(checkpoint)


def vectors(model, texts, **options):
    return torch.from_numpy(model.encode(texts, normalize_embeddings=True, **options))


def test_the_export_is_its_parent_at_one_granularity(checkpoint, parent, tmp_path):
    corpus = TEXTS[:3]
    report = export_submodel(checkpoint, tmp_path / "out", 3, 20, corpus=corpus, other_texts=TEXTS[3:])
    assert report["exit_layer"] == 3 and report["truncate_dim"] == 20 and report["max_difference"] < 1e-6
    assert report["bytes"] < report["parent"]["bytes"]
    wanted = vectors(parent, corpus, exit_layer=3, truncate_dim=20)
    for model in (
        SentenceTransformer(str(tmp_path / "out")),
        SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True),
        build_sentence_transformer(tmp_path / "out"),
    ):
        got = torch.from_numpy(model.encode(corpus))  # unit vectors of 20 dimensions without being asked
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
        shallow = torch.from_numpy(model.encode(corpus, exit_layer=1))
        torch.testing.assert_close(shallow, vectors(parent, corpus, exit_layer=1, truncate_dim=20), atol=1e-6, rtol=0)
    encoder = AutoModel.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(encoder.layers) == 3 and encoder.config.exit_layers == [1, 3]
    assert encoder.config.vocab_size == len(tokenizer) == report["vocabulary"]["new_size"]
    assert encoder.config.is_matryoshka and encoder.config.matryoshka_dimensions == [8, 20, 32]
    assert tokenizer.pad_token_id == encoder.config.pad_token_id
    state = encoder(**tokenizer(corpus[0], return_tensors="pt")).last_hidden_state
    with torch.no_grad():
        original = AutoModel.from_pretrained(checkpoint)(
            **AutoTokenizer.from_pretrained(checkpoint)(corpus[0], return_tensors="pt"), exit_layer=3
        ).last_hidden_state
    torch.testing.assert_close(state, original, atol=1e-6, rtol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "exit 3, 20 dimensions" in card and "other texts" in card
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == report


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_goes_along_and_training_goes_on(checkpoint, tokenizer, tmp_path, tied):
    parent = M3BertForMaskedLM.from_pretrained(checkpoint)
    if tied:
        parent.config.tie_word_embeddings = True
        parent.tie_weights()
        parent.save_pretrained(tmp_path / "parent")
        tokenizer.save_pretrained(tmp_path / "parent")
        checkpoint = tmp_path / "parent"
        parent = M3BertForMaskedLM.from_pretrained(checkpoint)
    export_submodel(checkpoint, tmp_path / "out", exit_layer=3, corpus=TEXTS[:3])
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    small = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.decoder.weight.shape == (len(small), 32)
    assert (model.decoder.weight is model.get_input_embeddings().weight) == tied
    kept = [tokenizer.convert_tokens_to_ids(t) for t in small.convert_ids_to_tokens(range(len(small)))]
    with torch.no_grad():
        got = model(**small(TEXTS[0], return_tensors="pt")).logits
        wanted = parent(**tokenizer(TEXTS[0], return_tensors="pt"), exit_layer=3).logits[..., kept]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    inputs = small(TEXTS[:2], return_tensors="pt", padding=True)
    loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
    loss.backward()
    assert loss.isfinite() and model.get_input_embeddings().weight.grad is not None
    without = export_submodel(checkpoint, tmp_path / "bare", exit_layer=3, corpus=TEXTS[:3], keep_mlm_head=False)
    assert without["parameters"] < sum(p.numel() for p in model.parameters())


def test_a_loaded_model_is_left_as_it_is(parent, tmp_path):
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    config = parent.transformers_model.config.to_dict()
    report = export_submodel(parent, tmp_path / "out", 1, 8, corpus=TEXTS[:2])
    assert report["max_difference"] < 1e-6
    assert parent.transformers_model.config.to_dict() == config and parent.exit_layers == [1, 3, 4]
    assert all(torch.equal(value, before[name]) for name, value in parent.state_dict().items())
    assert len(SentenceTransformer(str(tmp_path / "out")).transformers_model.layers) == 1


def test_prompts_norm_and_a_second_export(parent, tmp_path):
    parent.prompts = {"query": "frage: ", "document": "text: "}
    parent.append(Normalize())
    parent.save_pretrained(str(tmp_path / "parent"))
    export_submodel(tmp_path / "parent", tmp_path / "a", 3, 20)
    export_submodel(tmp_path / "a", tmp_path / "b", 1, 8)
    again = SentenceTransformer(str(tmp_path / "b"))
    assert again.prompts["query"] == "frage: "
    wanted = vectors(parent, ["frage: " + t for t in TEXTS], exit_layer=1, truncate_dim=8)
    torch.testing.assert_close(torch.from_numpy(again.encode_query(TEXTS)), wanted, atol=1e-6, rtol=0)


def test_low_precision(checkpoint, parent, tmp_path):
    report = export_submodel(checkpoint, tmp_path / "out", 3, 20, dtype=torch.bfloat16, keep_mlm_head=False)
    assert report["dtype"] == "bfloat16" and 0.98 < report["min_cosine"] < 1
    model = SentenceTransformer(str(tmp_path / "out"))
    assert model.transformers_model.dtype == torch.bfloat16
    plain = export_submodel(checkpoint, tmp_path / "plain", 3, 20, keep_mlm_head=False)
    assert report["bytes"] < 0.55 * plain["bytes"]


def test_nothing_is_written_where_something_is_wrong(checkpoint, tmp_path, monkeypatch):
    for options, message in (
        ({"exit_layer": 2}, "exit_layer=2"),
        ({"truncate_dim": 99}, "truncate_dim=99"),
        ({"corpus": [" "]}, "corpus is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            export_submodel(checkpoint, tmp_path / "out", **options)
    from m3bert_hf import export

    monkeypatch.setattr(export, "_compare", lambda *_: {"compared_texts": 1, "max_difference": 0.1, "min_cosine": 0.9})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ValueError, match="nothing was written"):
        export_submodel(checkpoint, tmp_path / "out", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "precious").exists()


def test_what_an_export_must_not_replace(checkpoint, tmp_path, monkeypatch):
    source = tmp_path / "run" / "checkpoint-5"
    shutil.copytree(checkpoint, source)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("x")
    monkeypatch.chdir(tmp_path / "notes")
    for output, message in (
        (tmp_path / "run", "the checkpoint to export or holds it"),
        (source, "the checkpoint to export or holds it"),
        (tmp_path / "notes", "the working directory"),
        (tmp_path, "the working directory"),
        (tmp_path / "notes" / "x.txt", "is no directory"),
    ):
        with pytest.raises(ValueError, match=message):
            export_submodel(source, output, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="something else than a checkpoint"):
        export_submodel(source, tmp_path / "notes", 1)
    for _ in range(2):  # an export may replace an export
        report = export_submodel(source, tmp_path / "out", 1)
    assert (source / "config.json").exists() and (tmp_path / "notes" / "x.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "out", "run"]
    shutil.copytree(checkpoint, source / "checkpoint-1")
    assert export_submodel(source, tmp_path / "out", 1)["parent"] == report["parent"]


def test_a_narrow_export_is_measured_and_trained_at_its_own_widths(checkpoint, tmp_path):
    export_submodel(checkpoint, tmp_path / "out", 3, 20)
    model = build_sentence_transformer(tmp_path / "out")
    assert model.embedding_width == 20 and model.matryoshka_dimensions == [8, 20]
    evaluator = GranularityEvaluator.from_pairs(TEXTS, TEXTS, measure_speed=False)
    assert evaluator.evaluate(model).truncate_dims == [8, 20]
    inner = MultipleNegativesRankingLoss(model)
    assert MultigranularLoss(model, inner).granularities == [(1, 8), (1, 20), (3, 8), (3, 20)]
    with pytest.raises(ValueError, match="vectors have 20"):
        MultigranularLoss(model, inner, [(1, 32)])
    with pytest.raises(ValueError, match="truncate_dim=32"):
        GranularityEvaluator.from_pairs(TEXTS, TEXTS, truncate_dims=[32]).evaluate(model)


def test_a_low_precision_parent_can_be_cut_again(checkpoint, tmp_path):
    export_submodel(checkpoint, tmp_path / "a", 3, dtype=torch.bfloat16, keep_mlm_head=False)
    narrow = export_submodel(tmp_path / "a", tmp_path / "b", 1, 20)
    wide = export_submodel(tmp_path / "a", tmp_path / "c", 1, dtype=torch.float32)
    assert narrow["min_cosine"] > 0.98 and wide["min_cosine"] > 0.98
    assert {p.dtype for p in build_sentence_transformer(tmp_path / "b").parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="covers no text"):
        export_submodel(checkpoint, tmp_path / "d", 1, vocabulary=["<pad>"])


def test_command(checkpoint, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    rows = [{"text": text, "lang": "en" if index < 2 else "xx"} for index, text in enumerate(TEXTS)]
    texts.write_text("\n".join(json.dumps(row) for row in rows))
    out = str(tmp_path / "out")
    main(
        f"export {checkpoint} {out} --exit-layer 3 --truncate-dim 20 --corpus {texts} --corpus-languages en "
        f"--sample {texts} --dtype float32".split()
    )
    printed = capsys.readouterr().out
    assert "exit 3, 20 dimensions" in printed and "vocabulary" in printed
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["vocabulary"]["corpus_texts"] == 2 and report["vocabulary"]["other_texts"] == 6
