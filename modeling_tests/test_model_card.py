from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from test_granularity_evaluator import CORPUS, QUERIES, RELEVANT

from m3bert_hf import GranularityEvaluator, GridReport
from m3bert_hf.__main__ import main
from m3bert_hf.model_card import read_facts, write_model_card


@pytest.fixture
def grid(sentence_model, tmp_path):
    groups = dict.fromkeys(QUERIES, "en")
    evaluator = GranularityEvaluator(
        QUERIES, CORPUS, RELEVANT, groups, precisions=("float32", "int8"), name="texts", cutoffs=(2,)
    )
    evaluator.evaluate(sentence_model).save(tmp_path / "grid")
    return tmp_path / "grid"


FACTS = {
    "name": "tiny",
    "summary": "A tiny one.",
    "license": "apache-2.0",
    "languages": ["en", "de"],
    "limits": ["It knows nothing."],
    "stages": [{"name": 1, "what": "w", "data": "d", "steps": 3, "amount": 4, "time": "1 s"}],
    "peers": {"texts": {"BM25": {"mrr@2": 0.25}}},
}


def test_a_card_says_what_was_measured(checkpoint, grid, tmp_path, capsys):
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(FACTS))
    target = tmp_path / "cards" / "tiny.md"
    main(
        [
            "card",
            str(checkpoint),
            "--facts",
            str(tmp_path / "facts.yaml"),
            "--grids",
            str(grid),
            "--output",
            str(target),
        ]
    )
    assert str(target) in capsys.readouterr().out
    card = ModelCard.load(target)
    assert card.data.license == "apache-2.0" and card.data.language == ["en", "de"]
    assert {"m3bert", "matryoshka"} <= set(card.data.tags)
    assert len(card.data.eval_results) == 9
    import json

    rows = json.loads((grid / "grid.json").read_text())["rows"]
    by_cell = {(r["exit_layer"], r["truncate_dim"]): r for r in rows if r["precision"] == "float32"}
    line = " | ".join(f"{by_cell[3, d]['mrr@2']:.3f}" for d in (8, 20, 32))
    assert f"| exit 3 | {line} |" in card.content
    assert "| BM25 | 0.250 |" in card.content and "- It knows nothing." in card.content
    assert "Stored as int8" in card.content and "| 1 | w | d | 3 | 4 | 1 s |" in card.content
    assert "None" not in card.content and "Undefined" not in card.content
    pictures = [part.split(")")[0] for part in card.content.split("](")[1:] if ".png" in part.split(")")[0]]
    assert len(pictures) == 3 and all((target.parent / p).stat().st_size > 5000 for p in pictures)


def test_the_card_of_a_checkpoint_without_grids(checkpoint, tmp_path):
    written = write_model_card(checkpoint, {k: FACTS[k] for k in list(FACTS)[:5]}, output=tmp_path / "README.md")
    assert "## Figures" not in written.read_text() and "exit_layer=1, truncate_dim=8" in written.read_text()


def test_missing_and_unknown_facts_are_named(tmp_path, checkpoint, grid):
    file = tmp_path / "facts.yaml"
    for facts, message in (
        ({**FACTS, "limits": []}, "does not state limits"),
        ({**FACTS, "licence": "x"}, "states licence, which no card has"),
        ([], "holds no facts"),
    ):
        file.write_text(yaml.safe_dump(facts))
        with pytest.raises(ValueError, match=message):
            read_facts(file)
    with pytest.raises(ValueError, match="holds no grid"):
        write_model_card(checkpoint, FACTS, [file])


def test_the_template_of_facts_is_complete():
    path = Path(__file__).parent.parent / "model_cards" / "facts-template.yaml"
    assert read_facts(path)["languages"] == ["en", "de", "ja"]
    assert (path.parent / "template.md").read_text().startswith("---\n{{ metadata }}")


def test_a_reference_group_is_told_apart_from_the_mean_of_the_others(checkpoint, tmp_path):
    def row(exit_layer, value, precision="float32"):
        groups = {"en": (value, 40), "de": (0.2, 30), "fr": (0.4, 90), "ja": (0.9, 29)}
        return {
            "exit_layer": exit_layer,
            "truncate_dim": 8,
            "precision": precision,
            "mrr@10": value,
            "bytes_per_vector": 32,
            "groups": {name: {"mrr@10": score, "queries": number} for name, (score, number) in groups.items()},
        }

    rows = [row(1, 0.5), row(3, 0.7), row(1, 0.1, "binary"), row(3, 0.9, "binary")]
    report = GridReport(rows, {"task": "t", "queries": 189, "documents": 9})
    report.to_json(tmp_path / "grid.json")
    peers = {"t": {"BM25": {"mrr@10": 0.1, "mrr@10/en": 0.25, "mrr@10/others": 0.05}}}
    facts = {**FACTS, "reference_group": "en", "peers": peers}
    text = write_model_card(checkpoint, facts, [tmp_path / "grid.json"], tmp_path / "card.md").read_text()
    assert "MRR@10, mean of the 2 other groups of 30 queries or more:" in text
    assert "| exit 1 | 0.500 |" in text and text.count("| exit 3 | 0.300 |") == 1
    assert "| model | MRR@10 | MRR@10/en | MRR@10/others |" in text
    assert "| this, exit 3, 8 dimensions | 0.700 | 0.700 | 0.300 |" in text
    assert "| this, exit 1, 8 dimensions | 0.500 | 0.500 | 0.300 |" in text
    assert "| BM25 | 0.100 | 0.250 | 0.050 |" in text


def test_the_card_of_a_pretrained_model_shows_how_to_fill_in_words(checkpoint, tmp_path):
    facts = {**{k: FACTS[k] for k in list(FACTS)[:5]}, "pipeline_tag": "fill-mask"}
    card = ModelCard.load(write_model_card(checkpoint, facts, output=tmp_path / "README.md"))
    assert card.data.pipeline_tag == "fill-mask" and card.data.library_name == "transformers"
    assert 'pipeline("fill-mask", model="tiny"' in card.content and "SentenceTransformer(" not in card.content
