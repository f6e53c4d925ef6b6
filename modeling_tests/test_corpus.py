import bz2
import gzip
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TEXTS

from m3bert_hf.corpus import is_held_out, load_documents, tokenize_corpus


ROWS = [{"lang": "en", "text": TEXTS[0]}, {"lang": "ja", "text": TEXTS[4]}, {"lang": None, "text": "no language"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")


def write(path, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in ROWS))
    return str(path)


@pytest.mark.parametrize(
    ("name", "opener"),
    [("a.jsonl", open), ("a.jsonl.xz", lzma.open), ("a.json.gz", gzip.open), ("a.jsonl.bz2", bz2.open)],
)
def test_json_lines_are_read_compressed_or_not(name, opener, tmp_path):
    documents = load_documents([write(tmp_path / name, opener)])
    assert documents["text"][:] == [row["text"] for row in ROWS]
    assert documents["language"][:] == ["en", "ja", ""]


def test_zstd(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = "\n".join(json.dumps(row) for row in ROWS).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    assert len(load_documents([str(tmp_path / "a.jsonl.zst")])) == 3


def test_parquet_text_patterns_and_directories(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"body": "of parquet", "lang": "en"}]), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("first document\nsecond line\n\nsecond document\n")
    parquet = load_documents([str(tmp_path / "*.parquet")], "body")
    assert parquet["text"][:] == ["of parquet"]
    text = load_documents([str(tmp_path / "b.txt")])
    assert [t.strip() for t in text["text"][:]] == ["first document\nsecond line", "second document"]
    write(tmp_path / "c.jsonl")
    (tmp_path / "a.parquet").unlink()
    assert len(load_documents([str(tmp_path)])) == 5


def test_columns_are_joined_and_the_first_set_that_fits_is_taken(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"query": "q", "document": "d", "lang": "en"}\n')
    documents = load_documents([write(tmp_path / "a.jsonl"), str(tmp_path / "pairs.jsonl")], "text|query,document")
    assert documents["text"][-1] == "q\nd" and documents["text"][0] == TEXTS[0]
    with pytest.raises(ValueError, match=r"pairs.jsonl has no column 'text'; it has \['query', 'document', 'lang'\]"):
        load_documents([str(tmp_path / "pairs.jsonl")])


def test_a_corrupt_shard_is_named(tmp_path):
    good = write(tmp_path / "good.jsonl.xz", lzma.open)
    whole = (tmp_path / "good.jsonl.xz").read_bytes()
    (tmp_path / "bad.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    for name in ("bad.jsonl.xz", "broken.jsonl"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load_documents([good, str(tmp_path / name)])
    with pytest.raises(ValueError, match="of no known format"):
        load_documents([write(tmp_path / "rows.csv")])
    with pytest.raises(FileNotFoundError, match="neither a file, a pattern, a directory, nor a dataset"):
        load_documents(["missing/set"])


def test_pieces_hold_every_token_once_and_empty_documents_leave_none(tokenizer, tmp_path):
    long = " ".join(TEXTS * 3)
    rows = [{"text": long, "lang": "x"}, {"text": "  "}, {"text": ""}, {"text": None}, {"text": "dog"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    corpus = tokenize_corpus(load_documents([str(tmp_path / "a.jsonl")]), tokenizer, max_length=20)
    ids = tokenizer(long, add_special_tokens=False)["input_ids"]
    pieces = corpus.documents(range(len(corpus.pieces)))
    inner = np.concatenate([piece[1:-1] for piece in pieces])
    assert inner.tolist() == ids[: len(inner)] and len(ids) - len(inner) < 8
    assert [len(piece) for piece in pieces] == corpus.lengths.tolist() and corpus.lengths.max() <= 20
    assert all(piece[0] == tokenizer.cls_token_id and piece[-1] == tokenizer.sep_token_id for piece in pieces)
    counts = corpus.token_counts(len(tokenizer))
    assert counts[tokenizer.cls_token_id] == len(pieces) and counts.sum() == corpus.lengths.sum()
    with pytest.raises(ValueError, match="No text to train on: all 1 documents"):
        tokenize_corpus(load_documents([str(tmp_path / "a.jsonl")]).select([1]), tokenizer, max_length=20)


def test_tokenising_happens_once(tokenizer, tmp_path, monkeypatch):
    documents = load_documents([write(tmp_path / "a.jsonl")])
    first = tokenize_corpus(documents, tokenizer, 20)
    # A tokenizer remembers how it was last used, which must not look like another one.
    tokenizer("a b c", truncation=True, max_length=2)
    calls = []
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **k: calls.append(1))
    again = tokenize_corpus(documents, tokenizer, 20)
    assert not calls and again.lengths.tolist() == first.lengths.tolist()


def test_the_held_out_split_is_by_document(tokenizer, tmp_path):
    rows = [{"text": f"{TEXTS[i % 6]} {i}"} for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows + rows[:50]))
    documents = load_documents([str(tmp_path / "a.jsonl")])
    corpus = tokenize_corpus(documents, tokenizer, 200, held_out_share=0.2)
    held = {tuple(d) for d in corpus.documents(np.flatnonzero(corpus.held_out))}
    kept = {tuple(d) for d in corpus.documents(np.flatnonzero(~corpus.held_out))}
    assert 0.1 < np.mean([is_held_out(row["text"], 0.2) for row in rows]) < 0.3
    assert not held & kept and held
    everything = tokenize_corpus(documents, tokenizer, 200)
    assert not everything.held_out.any() and len(everything.lengths) == len(corpus.lengths)
