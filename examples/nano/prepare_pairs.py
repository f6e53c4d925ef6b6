"""Prepare the fine-tuning pairs of m3bert-nano: translations found by joining, and packages kept out for validation.

python examples/nano/prepare_pairs.py DATA/finetune/pairs.jsonl.xz --output runs/m3bert-nano/pairs

The pairs of package descriptions hold translations without saying so. The same English text answers a short
description in English and one in Italian, so that the two mean the same; and the Italian short description leads to
the Italian long one as well as to the English one. Both joins become pairs of their own, which teach one space for all
languages. Validation packages are drawn by their English text; every row that touches one leaves the training file.
"""

import argparse
import gzip
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from m3bert_hf.text_data import read_json_lines


SAME, CROSS = "debian-packages", "debian-packages-crosslingual"


def unique(rows: list[dict[str, Any]], key: tuple[str, ...], value: str) -> dict[tuple, str]:
    """Map the fields `key` of rows to their `value` where all rows agree on it."""
    found: dict[tuple, set[str]] = defaultdict(set)
    for row in rows:
        found[tuple(row[name] for name in key)].add(row[value])
    return {fields: next(iter(values)) for fields, values in found.items() if len(values) == 1}


def translations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return pairs (text in a language, the same in English) of short and of long descriptions."""
    same = [row for row in rows if row["source"] == SAME]
    cross = [row for row in rows if row["source"] == CROSS]
    english = unique([row for row in same if row["lang"] == "en"], ("document",), "query")
    long_english = unique(cross, ("lang", "query"), "document")
    long_local = unique(same, ("lang", "query"), "document")
    pairs = []
    for row in cross:
        short = english.get((row["document"],))
        if short is not None and short != row["query"]:
            pairs.append({**row, "document": short, "source": f"{SAME}-short"})
    for (language, query), text in long_english.items():
        local = long_local.get((language, query))
        if local is not None and local != text:
            pairs.append({"query": local, "document": text, "lang": language, "source": f"{SAME}-long"})
    return pairs


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, packed."""
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows):,} rows")


def main() -> None:
    """Write `pairs.jsonl.gz`, `validation-queries.jsonl.gz` and `validation-documents.jsonl.gz`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="JSON lines with query, document, lang, source")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--validation", type=int, default=500, help="English descriptions to keep out")
    parser.add_argument("--pool", type=int, default=15000, help="documents of the validation, the others trained on")
    parser.add_argument("--queries", type=int, default=150, help="validation queries of a language at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)

    rows = [row for file in options.files for row in read_json_lines(file)]
    texts = sorted({row["document"] for row in rows if row["source"] == CROSS})
    held_out = set(generator.sample(texts, min(options.validation, len(texts) // 10)))
    kept, queries = [], defaultdict(list)
    touched = {row["query"] for row in rows if row["document"] in held_out}
    for row in rows:
        if row["document"] in held_out:
            queries[row["lang"]].append(row)
        elif row["query"] not in touched:
            kept.append(row)
    write(options.output / "pairs.jsonl.gz", kept + translations(kept))

    pool = generator.sample([text for text in texts if text not in held_out], min(options.pool, len(texts) // 2))
    numbers = {text: str(number) for number, text in enumerate([*sorted(held_out), *pool])}
    write(
        options.output / "validation-documents.jsonl.gz",
        [{"id": number, "document": text} for text, number in numbers.items()],
    )
    chosen = [
        {"id": numbers[row["document"]], "lang": language, "query": row["query"]}
        for language, group in sorted(queries.items())
        for row in generator.sample(group, min(options.queries, len(group)))
    ]
    write(options.output / "validation-queries.jsonl.gz", chosen)


if __name__ == "__main__":
    main()
