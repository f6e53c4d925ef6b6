import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, pipeline

from m3bert_hf import build_sentence_transformer
from m3bert_hf.text_data import read_json_lines


ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "checkpoints"
NAMES = ("m3bert-nano", "m3bert-nano-base")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_small_and_complete_and_its_source_is_the_package_s(name):
    directory = CHECKPOINTS / name
    files = [file for file in directory.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32 * 2**20
    needed = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert needed | ({"modules.json"} if name == "m3bert-nano" else set()) <= {file.name for file in files}
    for file in (ROOT / "src" / "m3bert_hf").glob("*_m3bert.py"):
        assert (directory / file.name).read_text() == file.read_text(), f"cp src/m3bert_hf/*_m3bert.py {directory}"


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_on_disk_is_float32_in_memory_and_every_class_reads_one_encoder(name):
    path = str(CHECKPOINTS / name)
    model, masked = AutoModel.from_pretrained(path), AutoModelForMaskedLM.from_pretrained(path)
    assert model.dtype == masked.dtype == torch.float32
    for (key, one), two in zip(model.state_dict().items(), masked.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), key
    embeddings = build_sentence_transformer(path).transformers_model.embeddings.word_embeddings.weight
    assert torch.equal(embeddings, masked.model.embeddings.word_embeddings.weight)
    assert torch.equal(embeddings, masked.decoder.weight) == masked.config.tie_word_embeddings


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text, word",
    [
        ("returns the <mask> of the string.", "value"),
        ("cette fonction retourne la <mask> de la chaîne.", "valeur"),
        ("diese Funktion gibt den <mask> zurück.", "wert"),
        ("esta función devuelve el <mask> de la variable.", "valor"),
        ("значение по <mask>", "умолчанию"),
    ],
)
def test_words_are_filled_in(name, text, word):
    fill = pipeline("fill-mask", model=str(CHECKPOINTS / name))
    assert word in [found["token_str"] for found in fill(text, top_k=3)]


def test_the_first_exit_finds_the_topic_in_every_language():
    model = build_sentence_transformer(str(CHECKPOINTS / "m3bert-nano"))
    passages = list(read_json_lines(ROOT / "examples" / "data" / "passages.jsonl"))
    queries = list(read_json_lines(ROOT / "examples" / "data" / "queries.jsonl"))
    options = {"exit_layer": model.exit_layers[0], "truncate_dim": 64, "convert_to_tensor": True}
    scores = model.similarity(
        model.encode_query([row["query"] for row in queries], **options),
        model.encode_document([row["document"] for row in passages], **options),
    )
    best = [passages[index]["topic"] for index in scores.argmax(dim=1).tolist()]
    languages: dict[str, list[bool]] = {}
    for row, topic in zip(queries, best, strict=True):
        languages.setdefault(row["lang"], []).append(row["id"].partition(".")[0] == topic)
    shares = {language: sum(right) / len(right) for language, right in languages.items()}
    assert len(shares) == 8 and min(shares.values()) > 0.65, json.dumps(shares)
