import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config
from test_trainer import CONFIG, arguments, data, history, training  # noqa: F401 (data is a fixture)

from m3bert_hf import M3BertForMaskedLM
from m3bert_hf.__main__ import _parse_recipe, main
from m3bert_hf.corpus import load_documents, tokenize_corpus
from m3bert_hf.pretraining import PretrainArguments, pretrain, start_from_token_frequencies
from m3bert_hf.trainer import M3BertTrainingArguments


def test_a_new_model_starts_at_the_token_frequencies(data, tokenizer):  # noqa: F811
    corpus = tokenize_corpus(load_documents([str(data / "text.jsonl")]), tokenizer, 24)
    torch.manual_seed(0)
    model = M3BertForMaskedLM(tiny_config(vocab_size=len(tokenizer), initializer_range=1e-4))
    start_from_token_frequencies(model, corpus)
    ids = torch.tensor([token for piece in corpus.documents(range(len(corpus.pieces))) for token in piece])
    frequency = torch.bincount(ids, minlength=len(tokenizer)) + 1.0
    logs = (frequency / frequency.sum()).log()
    block = torch.from_numpy(corpus.documents([0])[0])[None]
    loss = model(block, labels=block).granularity_losses
    torch.testing.assert_close(loss, -logs[block].mean().expand_as(loss), atol=0.02, rtol=0.01)
    assert -logs[ids].mean() < torch.tensor(float(len(tokenizer))).log() - 0.5


def test_stages_follow_one_another(data, tmp_path):  # noqa: F811
    pretrain(arguments(data), training(tmp_path / "one", max_steps=20))
    second = arguments(data, init_from=str(tmp_path / "one"), config=None)
    second.tokenizer = None
    pretrain(second, training(tmp_path / "two", max_steps=2, learning_rate=0.0))
    assert history(tmp_path / "two")[0]["loss"] < history(tmp_path / "one")[0]["loss"]
    # The tokenizer travels with the stage, and a field of the configuration may change where weights allow.
    assert (tmp_path / "two" / "tokenizer.json").exists()
    third = arguments(data, init_from=str(tmp_path / "one"), config={"exit_layers": [2]})
    assert pretrain(third, training(tmp_path / "three", max_steps=1)).config.exit_layers == [2]


def test_arguments_that_do_not_fit_are_named(data, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="max_length=64 is longer than the model takes"):
        pretrain(arguments(data, max_length=64), training(tmp_path))
    with pytest.raises(ValueError, match="row_length=16 must be at least max_length=32"):
        pretrain(arguments(data, row_length=16), training(tmp_path))
    with pytest.raises(ValueError, match=r"The tokenizer has \d+ tokens, the model only 100"):
        pretrain(arguments(data, config={**CONFIG, "vocab_size": 100}), training(tmp_path))
    nothing = arguments(data)
    nothing.tokenizer = None
    with pytest.raises(ValueError, match="Name a `tokenizer`"):
        pretrain(nothing, training(tmp_path / "nothing"))
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    nothing = arguments(data)
    nothing.train_files = [str(tmp_path / "empty.jsonl")]
    with pytest.raises(ValueError, match="No text to train on"):
        pretrain(nothing, training(tmp_path / "nothing"))


def test_command_reads_a_recipe_and_the_command_line_goes_over_it(data, tmp_path, capsys):  # noqa: F811
    recipe = {
        "tokenizer": str(data / "tokenizer"),
        "output_dir": str(tmp_path / "recipe"),
        "config": CONFIG,
        "max_length": 24,
        "mask_ratio": 0.4,
        "max_steps": 9,
        "report_to": "none",
        "use_cpu": True,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    files = ["--train_files", str(data / "text.jsonl")]
    main(["pretrain", str(tmp_path / "r.yaml"), *files, "--max_steps", "2", "--logging_steps", "1"])
    state = json.loads((tmp_path / "recipe" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    main(["curves", str(tmp_path / "recipe"), "--output", str(tmp_path / "c.png"), "--values", "loss"])
    assert "| 2 | 16 |" in capsys.readouterr().out and (tmp_path / "c.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="holds checkpoints of another run"):
        main(["pretrain", str(tmp_path / "r.yaml"), *files])
    (tmp_path / "bad.yaml").write_text("learning_rte: 1\n")
    with pytest.raises(SystemExit):
        main(["pretrain", str(tmp_path / "bad.yaml")])


def test_the_recipes_that_ship_are_read():
    examples = Path(__file__).parents[1] / "examples"
    recipes = sorted(examples.glob("pretraining/*/stage*.yaml"))
    assert len(recipes) == 6
    for recipe in recipes:
        own, settings = _parse_recipe(
            (PretrainArguments, M3BertTrainingArguments),
            [str(recipe), "--train_files", "x.jsonl", "--use_cpu", "true"],
            "test",
        )
        assert own.init_from or own.tokenizer
        settings.loss_options()
