import json

import pytest
import torch
from conftest import TEXTS, tiny_config
from transformers import TrainingArguments

from m3bert_hf import M3BertForMaskedLM
from m3bert_hf.__main__ import main
from m3bert_hf.pretraining import PretrainArguments, pretrain, start_from_token_frequencies, tokenize_blocks


CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "exit_layers": [1, 2],
    "matryoshka_dimensions": [8, 16],
    "max_position_embeddings": 32,
}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"lang": str(i % 3), "text": " ".join(TEXTS) * (1 + i % 2)} for i in range(30)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def settings(path, **fields):
    defaults = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "max_steps": 30,
        "learning_rate": 5e-3,
        "logging_steps": 5,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **fields})


def test_every_granularity_learns_and_is_logged(corpus, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t")
    arguments = PretrainArguments([str(corpus)], str(tmp_path / "t"), config=CONFIG, max_length=24)
    pretrain(arguments, settings(tmp_path / "out"))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    for name in ("loss_L1D8", "loss_L1D16", "loss_L2D8", "loss_L2D16"):
        assert logs[-1][name] < logs[0][name]
    parts = sum(logs[-1][f"loss_L{e}D{d}"] for e in (1, 2) for d in (8, 16))
    assert parts == pytest.approx(logs[-1]["loss"], rel=1e-3)
    assert M3BertForMaskedLM.from_pretrained(tmp_path / "out").config.exit_layers == [1, 2]
    arguments.init_from = str(tmp_path / "out")
    second = pretrain(arguments, settings(tmp_path / "next", max_steps=2))
    assert second.config.matryoshka_dimensions == [8, 16]


def test_accumulation_gives_the_same_model_as_a_large_batch(corpus, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t")
    arguments = PretrainArguments([str(corpus)], str(tmp_path / "t"), config=CONFIG, max_length=24)
    models, logs = [], []
    for batch, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        out = tmp_path / str(batch)
        fields = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": steps,
            "max_steps": 1,
            "logging_steps": 1,
            # The masks are drawn per call: without masking noise both must agree exactly, so all tokens are scored.
            "seed": 1,
        }
        arguments.mlm_probability = 1.0
        models.append(pretrain(arguments, settings(out, **fields)))
        logs.append(json.loads((out / "trainer_state.json").read_text())["log_history"][0])
    assert set(logs[0]) == set(logs[1])
    # Which tokens are replaced at random still differs; the scale of loss and gradient must not.
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=0.05)
    assert logs[1]["loss_L1D8"] == pytest.approx(logs[0]["loss_L1D8"], rel=0.05)
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=0.25)


def test_a_new_model_starts_at_the_token_frequencies(corpus, tokenizer):
    rows = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    dataset = tokenize_blocks(rows, tokenizer, 24)
    torch.manual_seed(0)
    model = M3BertForMaskedLM(tiny_config(vocab_size=len(tokenizer), initializer_range=1e-4))
    start_from_token_frequencies(model, dataset)
    ids = torch.tensor([token for block in dataset["input_ids"] for token in block])
    frequency = torch.bincount(ids, minlength=len(tokenizer)) + 1.0
    entropy = -(frequency / frequency.sum()).log()[ids].mean()
    block = torch.tensor([dataset["input_ids"][0]])
    loss = model(block, labels=block).granularity_losses
    expected = -(frequency / frequency.sum()).log()[block].mean()
    torch.testing.assert_close(loss, expected.expand_as(loss), atol=0.02, rtol=0.01)
    assert entropy < torch.tensor(float(len(tokenizer))).log()


def test_blocks_hold_every_token_once(tokenizer):
    text = " ".join(TEXTS)
    blocks = tokenize_blocks([text, "", "dog"], tokenizer, 20)["input_ids"]
    inner = [token for block in blocks for token in block[1:-1]]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert inner == ids[: len(inner)] and len(ids) - len(inner) < 8
    assert all(len(block) <= 20 and block[0] == 0 and block[-1] == 2 for block in blocks)


def test_no_text_is_an_error(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="No text to train on"):
        pretrain(PretrainArguments([str(empty)], str(tmp_path / "t"), config=CONFIG), settings(tmp_path / "o"))


def test_command_reads_a_recipe_and_the_command_line_goes_over_it(corpus, tokenizer, tmp_path):
    import yaml

    tokenizer.save_pretrained(tmp_path / "t")
    recipe = {
        "tokenizer": str(tmp_path / "t"),
        "output_dir": str(tmp_path / "recipe"),
        "config": CONFIG,
        "max_length": 24,
        "max_steps": 9,
        "report_to": "none",
        "use_cpu": True,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    main(["pretrain", str(tmp_path / "r.yaml"), "--train_files", str(corpus), "--max_steps", "2"])
    state = json.loads((tmp_path / "recipe" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    (tmp_path / "bad.yaml").write_text("learning_rte: 1\n")
    with pytest.raises(SystemExit):
        main(["pretrain", str(tmp_path / "bad.yaml")])
