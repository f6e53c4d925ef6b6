import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, tiny_config
from safetensors.torch import load_file

import m3bert_hf
from m3bert_hf import M3BertForMaskedLM
from m3bert_hf.masking import M3BertDataCollator
from m3bert_hf.pretraining import PretrainArguments, pretrain
from m3bert_hf.trainer import M3BertTrainer, M3BertTrainingArguments, last_complete_checkpoint


CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "exit_layers": [1, 2],
    "matryoshka_dimensions": [8, 16],
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
GRID = [f"L{layer}D{d}" for layer in (1, 2) for d in (8, 16)]


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tokenizer.save_pretrained(path / "tokenizer")
    rows = [{"lang": str(i % 3), "text": " ".join(TEXTS[i % 5 :]) + f" {i}"} for i in range(120)]
    (path / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def arguments(data, **fields):
    defaults = {"config": CONFIG, "max_length": 32, "row_length": 64, "held_out_share": 0.2, "eval_rows": 7}
    return PretrainArguments([str(data / "text.jsonl")], str(data / "tokenizer"), **{**defaults, **fields})


def training(path, **fields):
    defaults = {
        "output_dir": str(path),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 3,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return M3BertTrainingArguments(**{**defaults, **fields})


def history(path, key="loss"):
    state = json.loads((Path(path) / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if key in entry]


def weights(path):
    return load_file(Path(path) / "model.safetensors")


def assert_same_run(one, other, tolerance=2e-5):
    for a, b in zip(history(one), history(other), strict=True):
        for key in ("loss", "grad_norm", *(f"loss_{name}" for name in GRID)):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], atol=tolerance, rtol=1e-3)


def test_a_batch_that_does_not_fit_is_made_smaller(data, tmp_path, monkeypatch):
    """What happened in an attempt that ran out of memory is not part of the next one's logs."""
    seen = []
    real = M3BertForMaskedLM.forward

    def forward(self, input_ids=None, **kwargs):
        if self.training:
            seen.append(len(input_ids))
            if len(input_ids) > 6 and len(seen) > 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return real(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(M3BertForMaskedLM, "forward", forward)
    fields = {"auto_find_batch_size": True, "max_steps": 3, "logging_steps": 3, "save_steps": 3}
    pretrain(arguments(data), training(tmp_path, **fields))
    assert seen[:3] == [8, 8, 7] and seen[-3:] == [6, 6, 6]
    (log,) = history(tmp_path)
    # At the beginning every granularity's loss is about that of equally likely tokens.
    vocabulary = len(json.loads((data / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    for name in GRID:
        assert 0.5 * math.log(vocabulary) < log[f"loss_{name}"] < 1.5 * math.log(vocabulary)
    assert sum(log[f"loss_{name}"] for name in GRID) == pytest.approx(log["loss"], rel=1e-4)


def test_every_granularity_is_logged_and_evaluated(data, tmp_path):
    fields = {"max_steps": 40, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 10, "logging_steps": 10}
    pretrain(arguments(data), training(tmp_path, **fields))
    logs = history(tmp_path)
    for name in GRID:
        assert logs[-1][f"loss_{name}"] < logs[0][f"loss_{name}"]
    assert sum(logs[-1][f"loss_{name}"] for name in GRID) == pytest.approx(logs[-1]["loss"], rel=1e-4)
    assert logs[-1]["tokens_per_second"] > 0 and 0 < logs[-1]["matrix_rate_share"] < 1
    first, *_, last = history(tmp_path, "eval_loss")
    for name in GRID:
        assert last[f"eval_loss_{name}"] < first[f"eval_loss_{name}"]
        assert last[f"eval_perplexity_{name}"] == pytest.approx(2.718281828 ** last[f"eval_loss_{name}"], rel=1e-3)
        assert 0 <= last[f"eval_accuracy_{name}"] <= 1
    final = json.loads((tmp_path / "eval_results.json").read_text())
    assert final["eval_loss"] == pytest.approx(sum(final[f"eval_loss_{name}"] for name in GRID), rel=1e-4)
    assert M3BertForMaskedLM.from_pretrained(tmp_path).config.exit_layers == [1, 2]


def test_evaluation_averages_over_tokens_whatever_the_batch(data, tmp_path):
    model = pretrain(arguments(data), training(tmp_path / "a"))
    results = []
    for batch in (1, 4, 7):
        again = arguments(data, init_from=str(tmp_path / "a"), config=None)
        pretrain(again, training(tmp_path / str(batch), per_device_eval_batch_size=batch, learning_rate=0.0))
        results.append(json.loads((tmp_path / str(batch) / "eval_results.json").read_text()))
    for name in GRID:
        for metric in ("loss", "accuracy"):
            values = [result[f"eval_{metric}_{name}"] for result in results]
            assert values == pytest.approx([values[0]] * 3, rel=1e-4)
    assert model.config.matryoshka_dimensions == [8, 16]


@pytest.mark.parametrize("packing", [True, False])
def test_accumulation_gives_the_same_run_as_a_large_batch(packing, data, tmp_path):
    for batch, steps in ((8, 1), (2, 4)):
        fields = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        pretrain(arguments(data, packing=packing), training(tmp_path / str(batch), **fields))
    assert_same_run(tmp_path / "8", tmp_path / "2")


def launch(data, out, processes=1, *extra):
    recipe = {
        **vars(arguments(data)),
        "output_dir": str(out),
        "max_steps": 6,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8 // processes,
        "per_device_eval_batch_size": 2,
        "stochastic_granularities": None,
    }
    path = out.parent / f"{out.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29641"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, "-m", "m3bert_hf", "pretrain", str(path), *extra]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


def test_two_processes_train_as_one_does_on_twice_the_batch(data, tmp_path):
    finish(launch(data, tmp_path / "one"))
    finish(launch(data, tmp_path / "two", 2))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two"))
    for name in GRID:
        # 7 rows in batches of 2 for each of 2 processes: the filled-up rows must not count twice.
        assert one[f"eval_loss_{name}"] == pytest.approx(two[f"eval_loss_{name}"], rel=1e-4)
        assert one[f"eval_accuracy_{name}"] == pytest.approx(two[f"eval_accuracy_{name}"], rel=1e-4)


def test_killed_in_the_middle_and_resumed_the_curve_goes_on(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    extra = ("--max_steps", "40", "--stochastic_granularities", "2")
    finish(launch(data, whole, 1, *extra))
    process = launch(data, killed, 1, *extra)
    while not last_complete_checkpoint(killed):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (killed / "model.safetensors").exists()
    # A checkpoint that was being written is not one.
    (killed / "checkpoint-999").mkdir()
    finish(launch(data, killed, 1, *extra, "--resume_from_checkpoint", "true"))
    assert_same_run(whole, killed, tolerance=1e-6)


def test_resuming_on_other_data_and_starting_over_a_run_are_refused(data, tmp_path):
    pretrain(arguments(data), training(tmp_path))
    with pytest.raises(ValueError, match="holds checkpoints of another run, the last of them checkpoint-6"):
        pretrain(arguments(data), training(tmp_path))
    with pytest.raises(ValueError, match="The training set is not the one that"):
        pretrain(arguments(data), training(tmp_path, seed=3, max_steps=8, resume_from_checkpoint="true"))
    with pytest.raises(ValueError, match="There is no complete checkpoint"):
        pretrain(arguments(data), training(tmp_path / "new", resume_from_checkpoint="true"))
    pretrain(arguments(data), training(tmp_path / "new", resume_from_checkpoint="auto"))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_leaves_the_last_checkpoint(earlier, data, tmp_path, monkeypatch):
    real = M3BertForMaskedLM.save_pretrained

    def full(self, path, *rest, **kwargs):
        if not earlier or str(path).endswith("checkpoint-4"):
            (Path(path) / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(self, path, *rest, **kwargs)

    monkeypatch.setattr(M3BertForMaskedLM, "save_pretrained", full)
    kept = r"the last complete one is .*checkpoint-2" if earlier else "there is no earlier one"
    with pytest.raises(OSError, match=rf"No space left.*; {kept}.*MiB are free.*--resume_from_checkpoint"):
        pretrain(arguments(data), training(tmp_path, save_total_limit=1))
    found = last_complete_checkpoint(tmp_path)
    assert (found is not None) == earlier and not (tmp_path / "checkpoint-4").exists()


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_is_saved(data, tmp_path, monkeypatch):
    real = M3BertForMaskedLM.forward
    calls = []

    def broken(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 4:
            output["loss"] = output.loss * float("nan")
        return output

    monkeypatch.setattr(M3BertForMaskedLM, "forward", broken)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite by step 4.*checkpoint-2, is untouched"):
        pretrain(arguments(data, held_out_share=0.0), training(tmp_path))
    for tensor in weights(last_complete_checkpoint(tmp_path)).values():
        assert tensor.isfinite().all()


def test_the_trainer_alone_takes_any_dataset(tokenizer, tmp_path):
    """The example of the README."""
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS * 8]
    model = m3bert_hf.M3BertForMaskedLM(tiny_config(vocab_size=len(tokenizer)))
    trainer = m3bert_hf.M3BertTrainer(
        model=model,
        args=training(tmp_path, stochastic_granularities=1, max_steps=3),
        train_dataset=rows,
        eval_dataset=rows[:5],
        data_collator=m3bert_hf.M3BertDataCollator(tokenizer, mask_ratio=0.3),
    )
    trainer.train()
    assert len([e for e in trainer.state.log_history if "loss_L4D32" in e]) == 3
    assert "eval_accuracy_L1D8" in trainer.evaluate()
    with pytest.raises(AttributeError, match="has no attribute 'M3BertTrainr'"):
        m3bert_hf.M3BertTrainr  # noqa: B018


def test_norms_biases_and_embeddings_are_not_decayed(tokenizer, tmp_path):
    model = M3BertForMaskedLM(tiny_config(vocab_size=len(tokenizer)))
    trainer = M3BertTrainer(
        model=model, args=training(tmp_path), data_collator=M3BertDataCollator(tokenizer), train_dataset=[{}]
    )
    decayed = set(trainer.get_decay_parameter_names(model))
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "embeddings" not in name
        assert (name in decayed) == matrix, name


def test_the_trapezoid_warms_up_stays_and_decays(data, tmp_path):
    fields = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "decay_ratio": 0.5, "max_steps": 10}
    pretrain(arguments(data), training(tmp_path, **fields))
    rates = [entry["learning_rate"] for entry in history(tmp_path)]
    assert rates[0] < rates[1] and rates[2] == rates[4] == pytest.approx(5e-3)
    assert rates[5] > rates[7] > rates[9]


def test_loss_options_come_from_the_arguments(data, tmp_path):
    fields = {
        "granularities": ["1:8", "2:16"],
        "granularity_weights": [1.0, 2.0],
        "label_smoothing_factor": 0.1,
        "distillation_weight": 0.5,
        "z_loss_weight": 1e-4,
    }
    model = pretrain(arguments(data), training(tmp_path, **fields))
    assert model.loss_options.granularities == [(1, 8), (2, 16)] and model.loss_options.label_smoothing == 0.1
    logs = history(tmp_path)[-1]
    assert "loss_L1D8" in logs and "loss_L1D16" not in logs
    final = json.loads((tmp_path / "eval_results.json").read_text())
    assert final["eval_loss"] == pytest.approx(final["eval_loss_L1D8"] + 2 * final["eval_loss_L2D16"], rel=1e-4)
    with pytest.raises(ValueError, match="must be pairs exit:dimension"):
        training(tmp_path, granularities=["4"]).loss_options()
    with pytest.raises(ValueError, match=r"Granularity \(3, 8\) does not exist"):
        pretrain(arguments(data), training(tmp_path / "b", granularities=["3:8"]))
