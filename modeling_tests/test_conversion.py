import json
import shutil
from pathlib import Path

import pytest
import torch
from reference_m3bert import released_config, released_losses, released_weights, residual_streams
from safetensors.torch import load_file, save_file

from m3bert_hf import M3BertForMaskedLM, M3BertModel, convert_released_checkpoint
from m3bert_hf.__main__ import main
from m3bert_hf.conversion import _RENAMED


SHARED = Path(__file__).resolve().parents[2] / "shared" / "reference"
SHAPES = [
    {},
    {
        "mrl_layers": [2, 5],
        "num_hidden_layers": 5,
        "mrl_dims": [24],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    {"hidden_size": 20, "mrl_dims": [1, 20], "cur_dim": 1, "num_attention_heads": 5, "num_key_value_heads": 5},
]


def write_released(path, config, weights, form="safetensors"):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if form == "safetensors":
        save_file(weights, path / "model.safetensors")
    else:
        torch.save(weights, path / "pytorch_model.bin")


def batch(config):
    torch.manual_seed(1)
    ids = torch.randint(3, config["vocab_size"], (3, 13))
    mask = torch.ones_like(ids)
    mask[1, 8:] = mask[2, 1:] = 0
    ids[mask == 0] = 1
    labels = torch.where((torch.rand(ids.shape) < 0.4) & (mask == 1), ids, -100)
    labels[2, 0] = ids[2, 0]
    return ids, mask, labels


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_converted_models_equal_the_released_code_written_out(shape, form, tmp_path):
    config = released_config(**SHAPES[shape])
    weights = released_weights(config, seed=shape)
    write_released(tmp_path / "in", config, weights, form)
    convert_released_checkpoint(tmp_path / "in", tmp_path / "out")
    ids, mask, labels = batch(config)
    for weight in weights.values():
        weight.requires_grad_()

    model = M3BertForMaskedLM.from_pretrained(tmp_path / "out", exit_norm="last")
    expected = released_losses(weights, config, ids, mask, labels)
    output = model(ids, mask, labels=labels)
    torch.testing.assert_close(output.granularity_losses, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.sum(), atol=1e-4, rtol=1e-5)
    output.loss.backward()
    expected.sum().backward()
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        if name != "lm_head.bias":
            got = parameters[_RENAMED.get(name, name)].grad
            torch.testing.assert_close(got, weight.grad, atol=2e-5, rtol=1e-4, msg=name)

    normed = M3BertModel.from_pretrained(tmp_path / "out")
    assert normed.config.exit_norm == "shared"
    states = residual_streams(weights, config, ids, mask)
    for layer in config["mrl_layers"]:
        state = states[layer - 1]
        state = state * (state.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        state = state * weights["model.norm.weight"]
        got = normed(ids, mask, exit_layer=layer).last_hidden_state
        torch.testing.assert_close(got[mask.bool()], state[mask.bool()], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the vectors of the authors' code are not here")
@pytest.mark.parametrize("prefix", sorted(p.name.removesuffix(".config.json") for p in SHARED.glob("*.config.json")))
def test_vectors_of_the_authors_code(prefix, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(SHARED / f"{prefix}.config.json", source / "config.json")
    shutil.copy(SHARED / f"{prefix}.weights.safetensors", source / "model.safetensors")
    convert_released_checkpoint(source, tmp_path / "out")
    expected = load_file(SHARED / f"{prefix}.expected.safetensors")
    ids, mask, labels = (expected[key] for key in ("input_ids", "attention_mask", "labels"))
    real = mask.bool()

    model = M3BertForMaskedLM.from_pretrained(tmp_path / "out", exit_norm="last").eval()
    config = model.config
    states = model.model(ids, mask, output_exits=True).exit_hidden_states
    for layer, state in zip(config.exit_layers, states, strict=True):
        torch.testing.assert_close(state[real], expected[f"pretrain_hidden.L{layer}"][real], atol=1e-5, rtol=0)
        for width in config.matryoshka_dimensions:
            logits = model(ids, mask, exit_layer=layer, truncate_dim=width).logits[:, :4]
            wanted = expected[f"logits.L{layer}D{width}"]
            torch.testing.assert_close(logits[real[:, :4]], wanted[real[:, :4]], atol=1e-5, rtol=0)
    output = model(ids, mask, labels=labels)
    torch.testing.assert_close(output.granularity_losses, expected["mlm_loss_grid"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, expected["mlm_loss_sum"][0], atol=1e-5, rtol=0)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = [key for key in expected if key.startswith("grad.")]
    assert gradients
    for key in gradients:
        name = key.removeprefix("grad.")
        torch.testing.assert_close(parameters[_RENAMED.get(name, name)].grad, expected[key], atol=1e-5, rtol=0)

    shared = M3BertModel.from_pretrained(tmp_path / "out", exit_norm="shared").eval()
    for layer in config.exit_layers:
        state = shared(ids, mask, exit_layer=layer).last_hidden_state
        torch.testing.assert_close(state[real], expected[f"truncated_last_hidden.L{layer}"][real], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, weights: config.pop("mrl_dims"), "lacks"),
        (lambda config, weights: config.update(bi_attn=False), "bi_attn"),
        (lambda config, weights: weights.pop("model.norm.weight"), "do not fit"),
        (lambda config, weights: weights.update({"model.extra.weight": torch.zeros(1)}), "no released m3BERT has"),
        (lambda config, weights: config.update(vocab_size=78), "do not fit"),
        (lambda config, weights: weights["lm_head.bias"].add_(1), "differ"),
    ],
)
def test_what_is_not_a_released_checkpoint_is_refused(change, message, tmp_path):
    config = released_config()
    weights = released_weights(config)
    change(config, weights)
    write_released(tmp_path / "in", config, weights)
    with pytest.raises(ValueError, match=message):
        convert_released_checkpoint(tmp_path / "in", tmp_path / "out")


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        convert_released_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps(released_config()))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        convert_released_checkpoint(tmp_path, tmp_path / "out")
    write_released(tmp_path, released_config(), released_weights(released_config()))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match="corrupt or incomplete"):
        convert_released_checkpoint(tmp_path, tmp_path / "out")


def test_a_bin_file_with_code_is_not_executed(tmp_path):
    class Danger:
        def __reduce__(self):
            return (print, ("executed",))

    write_released(tmp_path, released_config(), {"x": Danger()}, "bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported|cannot be read"):
        convert_released_checkpoint(tmp_path, tmp_path / "out")


def test_command(tmp_path, capsys):
    write_released(tmp_path / "in", released_config(), released_weights(released_config()))
    main(["convert", str(tmp_path / "in"), str(tmp_path / "out")])
    assert "exit_norm='shared'" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(SystemExit, match=r"config\.json"):
        main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out2")])
