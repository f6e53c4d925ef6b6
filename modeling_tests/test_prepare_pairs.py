import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from m3bert_hf.text_data import read_json_lines


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "nano" / "prepare_pairs.py"
SAME, CROSS = "debian-packages", "debian-packages-crosslingual"


@pytest.fixture
def prepared(tmp_path):
    """Forty packages in English and two translations, and pairs of another source."""
    rows = []
    for i in range(40):
        rows.append({"source": SAME, "lang": "en", "query": f"short en {i}", "document": f"long en {i}"})
        for lang in ("it", "ja"):
            rows.append({"source": SAME, "lang": lang, "query": f"short {lang} {i}", "document": f"long {lang} {i}"})
            rows.append({"source": CROSS, "lang": lang, "query": f"short {lang} {i}", "document": f"long en {i}"})
    # Two packages with one short description: which long texts translate one another cannot be told.
    rows += [
        {"source": source, "lang": "it", "query": "both", "document": f"{kind} both {i}"}
        for i in range(2)
        for source, kind in ((SAME, "long it"), (CROSS, "long en"))
    ]
    rows.append({"source": "manual", "lang": "de", "query": "title", "document": "page"})
    file = tmp_path / "pairs.jsonl.gz"
    with gzip.open(file, "wt") as target:
        target.writelines(json.dumps(row) + "\n" for row in rows)
    output = tmp_path / "out"
    command = [sys.executable, SCRIPT, file, "--output", output, "--validation", "4", "--pool", "10", "--queries", "3"]
    subprocess.run(command, check=True, capture_output=True)
    names = ("pairs", "validation-queries", "validation-documents")
    return tuple(list(read_json_lines(output / f"{name}.jsonl.gz")) for name in names)


def test_translations_are_found_by_joining(prepared):
    pairs, _, _ = prepared
    found = {kind: [r for r in pairs if r["source"] == f"{SAME}-{kind}"] for kind in ("short", "long")}
    assert len(found["short"]) >= 60 and len(found["long"]) >= 60
    for kind, rows in found.items():
        for row in rows:
            number = row["query"].rpartition(" ")[2]
            assert row["query"] == f"{kind} {row['lang']} {number}" and row["document"] == f"{kind} en {number}"
    assert any(row["source"] == "manual" for row in pairs)


def test_nothing_of_a_validation_package_is_trained_on(prepared):
    pairs, queries, documents = prepared
    asked = {row["id"] for row in queries}
    held_out = [row["document"] for row in documents if row["id"] in asked]
    assert 1 <= len(held_out) <= 4 and len(documents) == 14
    trained = {row[key] for row in pairs for key in ("query", "document")}
    for text in held_out:
        number = text.rpartition(" ")[2]
        if "both" not in text:
            assert (
                not {f"{kind} {lang} {number}" for kind in ("short", "long") for lang in ("en", "it", "ja")} & trained
            )
    assert all(sum(row["lang"] == lang for row in queries) <= 3 for lang in ("en", "it", "ja"))
