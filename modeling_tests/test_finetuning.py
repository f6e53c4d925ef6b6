import json
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TEXTS
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from m3bert_hf import build_sentence_transformer
from m3bert_hf.__main__ import _parse_recipe
from m3bert_hf.finetuning import (
    FinetuneArguments,
    count_tokens,
    finetune,
    load_pairs,
    load_start,
    parse_granularities,
)
from m3bert_hf.multigranular_loss import MultigranularLoss


def test_training_brings_each_query_to_its_document_at_every_granularity(checkpoint, pairs, tmp_path):
    training = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=6,
        max_steps=25,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    finetune(FinetuneArguments(str(checkpoint), [str(pairs)]), training)
    before, after = build_sentence_transformer(checkpoint), SentenceTransformer(str(tmp_path / "out"))
    queries = [text[:10] for text in TEXTS]
    for layer in (1, 3, 4):
        for width in (8, 20, 32):
            options = {"exit_layer": layer, "truncate_dim": width, "normalize_embeddings": True}
            margins = []
            for model in (before, after):
                scores = model.encode(queries, **options) @ model.encode(TEXTS, **options).T
                margins.append(np.mean(np.diag(scores)) - np.mean(scores))
            assert margins[1] > margins[0] + 0.1
    assert after[0].query_length is None


def test_what_is_evaluated_is_never_trained_on(pairs, tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(
        json.dumps({"id": "1", "query": TEXTS[0][:10]}) + "\n" + json.dumps({"id": "2", "document": TEXTS[1]})
    )
    arguments = FinetuneArguments("unused", [str(pairs)], exclude_files=[str(held_out)])
    documents = load_pairs(arguments, seed=0)["document"]
    assert sorted(documents) == sorted(TEXTS[2:])
    arguments.exclude_files = [str(pairs)]
    with pytest.raises(ValueError, match="No pairs to train on"):
        load_pairs(arguments, seed=0)


def many_pairs(path, sizes):
    rows = [
        {"source": source, "lang": lang, "query": f"{source} {lang} {i}", "document": f"about {source} {lang} {i:02}"}
        for (source, lang), size in sizes.items()
        for i in range(size)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return FinetuneArguments("unused", [str(path)], batches_by=["source", "lang"], temperature=1.0)


def test_a_batch_has_one_source_and_language_where_there_are_enough(tmp_path):
    sizes = {("a.b", "x"): 7, ("a.b", "y"): 2, ("a.b", "z"): 3, ("b", "x"): 1, ("others", "x"): 6, ("a.b/x", "v"): 3}
    sizes[("a.b/x", "w")] = 3
    arguments = many_pairs(tmp_path / "p.jsonl", sizes)
    parts = load_pairs(arguments, 0, batch_size=5)
    # What is too small for a batch joins the rest of its source, and after that the rest of all.
    found = sorted(
        (sorted({" ".join(text.split()[:2]) for text in part["query"]}), len(part)) for part in parts.values()
    )
    assert found == [
        (["a.b x"], 7),
        (["a.b y", "a.b z"], 5),
        (["a.b/x v", "a.b/x w"], 6),
        (["b x"], 1),
        (["others x"], 6),
    ]
    torch.nn.Sequential(OrderedDict((name, torch.nn.Identity()) for name in parts))
    queries = [text for part in parts.values() for text in part["query"]]
    assert len(queries) == len(set(queries)) == sum(sizes.values())
    arguments.batches_by = ["source", "language"]
    with pytest.raises(ValueError, match="no row has language; fields are document, lang, query, source"):
        load_pairs(arguments, 0, batch_size=5)


def test_training_in_batches_of_neighbours(checkpoint, tmp_path, monkeypatch):
    arguments = many_pairs(tmp_path / "p.jsonl", {("a", "x"): 14, ("a", "y"): 12, ("b", "x"): 3})
    arguments.model, arguments.neighbours, arguments.whiten_embeddings = str(checkpoint), 3, True
    batches = []
    forward = MultigranularLoss.forward

    def watch(self, features, labels):
        batches.append(self.model.tokenizer.batch_decode(features[1]["input_ids"], skip_special_tokens=True))
        return forward(self, features, labels)

    monkeypatch.setattr(MultigranularLoss, "forward", watch)
    finetune(arguments, arguments_for(tmp_path, max_steps=-1, num_train_epochs=1))
    assert sorted(text for batch in batches for text in batch) == sorted(
        f"about {group} {i:02}" for group, size in (("a x", 14), ("a y", 12), ("b x", 3)) for i in range(size)
    )
    for batch in batches:
        assert len({text[:-3] for text in batch}) == 1


def test_tokens_are_counted_as_they_are_trained_on(checkpoint, pairs):
    model = build_sentence_transformer(checkpoint)
    arguments = FinetuneArguments(str(checkpoint), [str(pairs)], query_length=4, document_length=6)
    data = load_pairs(arguments, 0)
    counts = count_tokens(model, data, arguments)
    ids = [i for row in data for i in model.tokenizer(row["query"], truncation=True, max_length=4)["input_ids"]]
    ids += [i for row in data for i in model.tokenizer(row["document"], truncation=True, max_length=6)["input_ids"]]
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == dict(Counter(ids))
    assert counts[model.tokenizer.cls_token_id] == 2 * len(data)


def arguments_for(tmp_path, **options):
    return SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": 2, "learning_rate": 1e-2, **options},
    )


def test_one_granularity_loads_and_saves_no_more_than_it_needs(checkpoint, pairs, tmp_path):
    arguments = FinetuneArguments(str(checkpoint), [str(pairs)], granularities=["3:20"])
    model = finetune(arguments, arguments_for(tmp_path))
    config = model.transformers_model.config
    assert (config.num_hidden_layers, config.exit_layers, config.matryoshka_dimensions) == (3, [3], [20, 32])
    again = SentenceTransformer(str(tmp_path / "out"))
    assert again.encode("text").shape == (20,)
    assert not any(".layers.3." in name or name.startswith("layers.3.") for name in again.state_dict())


def test_partial_initialization_takes_any_first_layers(checkpoint, pairs):
    arguments = FinetuneArguments(str(checkpoint), [str(pairs)], granularities=["2:9"])
    with pytest.raises(ValueError, match="exit_layer=2 does not exist"):
        load_start(arguments)
    arguments.partial_initialization = True
    model, granularities = load_start(arguments)
    assert granularities == [(2, 9)] and model.exit_layers == [2]
    whole = build_sentence_transformer(checkpoint).state_dict()
    for name, weight in model.state_dict().items():
        assert np.array_equal(weight, whole[name])
    for text, message in (("4-8", "is not exit:dimension"), ("4:99", "truncate_dim=99"), ("9:8", "9 layers")):
        arguments.granularities = [text]
        with pytest.raises(ValueError, match=message):
            load_start(arguments)


def test_negatives_from_the_files_and_mined(checkpoint, pairs, tmp_path):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for index, row in enumerate(rows):
        row["negatives"] = [TEXTS[index - 1], TEXTS[index - 2]]
    pairs.write_text("\n".join(json.dumps(row) for row in rows))
    arguments = FinetuneArguments(str(checkpoint), [str(pairs)])
    assert load_pairs(arguments, 0).column_names == ["query", "document", "negative_1", "negative_2"]
    finetune(arguments, arguments_for(tmp_path))
    arguments.mined_negatives = 1
    with pytest.raises(ValueError, match="hold negatives already"):
        finetune(arguments, arguments_for(tmp_path))
    rows[0]["negatives"] = []
    pairs.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match="same number of `negatives`"):
        load_pairs(arguments, 0)
    for row in rows:
        del row["negatives"]
    pairs.write_text("\n".join(json.dumps(row) for row in rows))
    arguments.mining_range, arguments.mining_relative_margin = [0, 5], None
    mined = finetune(arguments, arguments_for(tmp_path))
    assert mined.exit_layers == [1, 3, 4]
    arguments.batches_by = ["lang"]
    grouped = finetune(arguments, arguments_for(tmp_path))
    assert grouped.exit_layers == [1, 3, 4]
    arguments.mining_range = [50, 60]
    with pytest.raises(ValueError, match="No group has 1 negatives"):
        finetune(arguments, arguments_for(tmp_path))
    arguments.batches_by = []
    with pytest.raises(ValueError, match="widen mining_range"):
        finetune(arguments, arguments_for(tmp_path))


def test_the_best_checkpoint_of_the_grid_is_kept(checkpoint, pairs, tmp_path):
    held_out = ["red cat", "green meadow", "small dog"]
    queries, documents = tmp_path / "q.jsonl", tmp_path / "d.jsonl"
    queries.write_text("\n".join(json.dumps({"id": i, "query": t[:5]}) for i, t in enumerate(held_out)))
    documents.write_text("\n".join(json.dumps({"id": i, "document": t}) for i, t in enumerate(held_out)))
    arguments = FinetuneArguments(
        str(checkpoint), [str(pairs)], eval_queries=str(queries), eval_documents=str(documents), mini_batch_size=2
    )
    training = arguments_for(
        tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, max_steps=6
    )
    finetune(arguments, training)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    values = {row["step"]: row["eval_q_mean_mrr@10"] for row in state["log_history"] if "eval_q_mean_mrr@10" in row}
    assert sorted(values) == [2, 4, 6] and state["best_metric"] == max(values.values())
    assert state["best_model_checkpoint"].endswith(str(state["best_global_step"]))
    assert any("eval_q_exit3_dim20_recall@100" in row for row in state["log_history"])


def test_a_recipe_may_write_a_pair_without_quotes():
    pairs = yaml.safe_load("[12:32, 4:64, '2:8']")
    assert parse_granularities(pairs) == [(12, 32), (4, 64), (2, 8)]


def test_rows_without_text_are_named(pairs):
    pairs.write_text(json.dumps({"query": " ", "document": "x"}))
    with pytest.raises(ValueError, match="no text in 'query'"):
        load_pairs(FinetuneArguments("unused", [str(pairs)]), 0)


@pytest.mark.parametrize("name", ["finetune", "finetune_all"])
def test_the_recipes_of_the_shipped_model_are_read(name):
    recipe = Path(__file__).parents[1] / "examples" / "nano" / f"{name}.yaml"
    classes = (FinetuneArguments, SentenceTransformerTrainingArguments)
    own, settings = _parse_recipe(classes, [str(recipe), "--use_cpu", "true"], "test")
    cells = len(parse_granularities(own.granularities) or range(12))
    assert len(own.granularity_weights) == cells == (4 if name == "finetune" else 12)
    # Dictionaries of a recipe must arrive as such, and not as text or not at all.
    assert settings.learning_rate_mapping["word_embeddings"] > settings.learning_rate
    assert settings.max_steps > 0 and bool(settings.lr_scheduler_kwargs) == (name == "finetune")
