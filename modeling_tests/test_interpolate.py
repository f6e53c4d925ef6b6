import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from m3bert_hf import M3BertForMaskedLM, M3BertModel


SCRIPT = str(Path(__file__).resolve().parent.parent / "examples" / "nano" / "interpolate.py")


@pytest.fixture
def two(tmp_path):
    torch.manual_seed(0)
    M3BertModel(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "first")
    M3BertForMaskedLM(tiny_config()).save_pretrained(tmp_path / "second")
    (tmp_path / "second" / "checkpoint-3").mkdir()
    return tmp_path


def run(monkeypatch, folder, share, first="first", second="second"):
    arguments = [folder / first, folder / second, "--share", share, "--output", folder / "mixed"]
    monkeypatch.setattr(sys, "argv", ["interpolate.py", *map(str, arguments)])
    runpy.run_path(SCRIPT, run_name="__main__")
    return M3BertForMaskedLM.from_pretrained(folder / "mixed")


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_encoder_lies_between_and_the_head_is_the_second_s(two, monkeypatch, share):
    mixed = run(monkeypatch, two, share)
    first, second = M3BertModel.from_pretrained(two / "first"), M3BertForMaskedLM.from_pretrained(two / "second")
    for name, weight in mixed.model.state_dict().items():
        expected = (1 - share) * first.state_dict()[name] + share * second.model.state_dict()[name]
        torch.testing.assert_close(weight, expected)
    assert torch.equal(mixed.decoder.weight, second.decoder.weight)
    assert torch.equal(mixed.head.dense.weight, second.head.dense.weight)
    assert not (two / "mixed" / "checkpoint-3").exists()


def test_what_does_not_fit_is_refused(two, monkeypatch):
    with pytest.raises(ValueError, match=r"--share 1\.5 must be within 0 and 1"):
        run(monkeypatch, two, 1.5)
    M3BertModel(tiny_config(num_hidden_layers=1, exit_layers=[1])).save_pretrained(two / "shallow")
    with pytest.raises(ValueError, match=r"lacks .*layers\.1"):
        run(monkeypatch, two, 0.5, first="shallow")
