"""The newcomer's first command, on the checkpoint and the collection that ship here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m3bert_hf import GranularityEvaluator, M3BertModel, build_sentence_transformer
from m3bert_hf.retrieval_task import RetrievalTask


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NANO = ROOT / "checkpoints" / "m3bert-nano"


def rows(name):
    return [json.loads(line) for line in (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()]


def cells(model, task):
    report = GranularityEvaluator.from_task(task, cutoffs=(10,), measure_speed=False).evaluate(model)
    return {(row["exit_layer"], row["truncate_dim"]): row["mrr@10"] for row in report.rows}


def run(*arguments):
    return subprocess.run([sys.executable, EXAMPLES / "search.py", *arguments], capture_output=True, text=True)


def test_collection_is_large_and_multilingual():
    passages = rows("passages.jsonl")
    assert len(passages) >= 150 and len({row["lang"] for row in passages}) >= 8
    assert len({row["document"] for row in passages}) == len(passages)


def test_labelled_queries_find_their_passages_at_every_granularity():
    passages, queries = rows("passages.jsonl"), rows("queries.jsonl")
    places = {row["id"]: i for i, row in enumerate(passages)}
    task = RetrievalTask(
        [row["query"] for row in queries],
        [row["document"] for row in passages],
        [{places[row["id"]]} for row in queries],
    )
    model = build_sentence_transformer(NANO)
    grid = cells(model, task)
    torch.manual_seed(0)
    model[0].model = M3BertModel(model[0].model.config).eval()
    random = cells(model, task)
    # Random token vectors already find a passage that shares words with its query, the better the wider they are.
    assert all(grid[cell] > random[cell] + 0.1 for cell in grid), (grid, random)
    assert min(grid.values()) > 0.65 and max(grid.values()) > 0.75, grid


def test_command_prints_hits_at_several_granularities(tmp_path):
    result = run("how do I resize a photo", "--top-k", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("dimensions: query") >= 4
    one = run("写真のサイズを変更する", "--exit-layer", "2", "--truncate-dim", "32", "--top-k", "1")
    assert one.stdout.count("dimensions: query") == 1 and "exit 2 of" in one.stdout
    own = tmp_path / "own.txt"
    own.write_text("a page about cats\na page about printers and paper\n")
    assert "cats" in run("cats", "--documents", str(own), "--top-k", "1").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "--exit-layer", "9"), "exit_layer=9 does not exist"),
        (("x", "--truncate-dim", "999"), "truncate_dim=999 does not exist"),
        (("x", "--documents", "/nowhere.jsonl"), "nowhere.jsonl"),
        (("  ",), "query is empty"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
