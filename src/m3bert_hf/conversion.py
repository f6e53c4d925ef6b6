"""Conversion of checkpoints in the format of the authors' release (GitHub XMUDeepLIT/m3bert) into this package's."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .configuration_m3bert import M3BertConfig
from .modeling_m3bert import M3BertForMaskedLM


# Released parameter names to ours; the layers' own names are the same.
_RENAMED = {
    "model.embed_tokens.weight": "model.embeddings.word_embeddings.weight",
    "model.pos_embeddings.weight": "model.embeddings.position_embeddings.weight",
    "model.input_norm.weight": "model.embeddings.norm.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.dense.weight": "head.dense.weight",
    "lm_head.dense.bias": "head.dense.bias",
    "lm_head.layer_norm.weight": "head.norm.weight",
    "lm_head.decoder.weight": "decoder.weight",
    "lm_head.decoder.bias": "decoder.bias",
}
_KEPT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "attention_dropout",
    "hidden_dropout",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
)


def convert_released_config(released: dict) -> M3BertConfig:
    """Translate a released `config.json`.

    Args:
        released: The parsed file, with `mrl_layers`, `mrl_dims` and `cur_dim`.

    Raises:
        ValueError: If it is not a released m3BERT configuration, or describes a model that this one is not.
    """
    absent = [key for key in ("mrl_layers", "mrl_dims", "hidden_size", "num_hidden_layers") if key not in released]
    if absent:
        raise ValueError(
            f"Not a released m3BERT configuration: it lacks {absent}. A directory that this package saved needs no "
            "conversion; load it with from_pretrained."
        )
    for key, expected in (("bi_attn", True), ("attention_bias", False), ("mlp_bias", False)):
        if released.get(key, expected) != expected:
            raise ValueError(f"Released checkpoints with {key}={released[key]} are not supported, only {expected}.")
    fields = {key: released[key] for key in _KEPT_FIELDS if released.get(key) is not None}
    # cur_dim is where a training run stood, not a property of the weights: the full width stays the default.
    return M3BertConfig(
        **fields,
        embedding_dropout=released.get("input_dropout", 0.0),
        exit_layers=sorted(set(released["mrl_layers"]) | {released["num_hidden_layers"]}),
        matryoshka_dimensions=sorted(set(released["mrl_dims"])),
        exit_norm="shared",
    )


def convert_released_state_dict(released: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename released parameters; the tensors are not copied.

    Raises:
        ValueError: If a parameter is unknown, or the decoder's two biases differ.
    """
    state_dict, unknown = {}, []
    for name, tensor in released.items():
        if name.startswith("model.layers."):
            state_dict[name] = tensor
        elif name in _RENAMED:
            state_dict[_RENAMED[name]] = tensor
        elif name != "lm_head.bias" and not name.endswith("rotary_emb.inv_freq"):
            unknown.append(name)
    if unknown:
        raise ValueError(f"Parameters that no released m3BERT has: {unknown[:5]} ({len(unknown)} in all).")
    # The release holds one bias under two names, as RoBERTa does, and may save only one of them.
    bias = released.get("lm_head.bias")
    if bias is not None and "decoder.bias" in state_dict and not torch.equal(bias, state_dict["decoder.bias"]):
        raise ValueError("lm_head.bias and lm_head.decoder.bias differ, although the release ties them.")
    if bias is not None:
        state_dict.setdefault("decoder.bias", bias)
    return state_dict


def _read_weights(source: Path) -> dict[str, torch.Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = source / name
        index = source / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [source / shard for shard in shards]
        elif path.is_file():
            files = [path]
        else:
            continue
        weights: dict[str, torch.Tensor] = {}
        for file in files:
            try:
                if file.suffix == ".safetensors":
                    weights.update(load_file(file))
                else:
                    weights.update(torch.load(file, map_location="cpu", weights_only=True))
            except (SafetensorError, OSError, RuntimeError, EOFError) as error:
                raise OSError(f"{file} cannot be read ({error}): it is missing, corrupt or incomplete.") from error
        return weights
    raise FileNotFoundError(f"{source} holds neither model.safetensors nor pytorch_model.bin.")


def convert_released_checkpoint(source_dir: str | Path, output_dir: str | Path) -> M3BertForMaskedLM:
    """Convert a released checkpoint and save it in Hub format.

    The saved default is `exit_norm="shared"`: the final norm runs at every exit. That is what the release computes
    when it evaluates or fine-tunes a truncated model, and at the deepest exit it is what its pretraining computes
    too. `from_pretrained(output_dir, exit_norm="last")` gives the states that its pretraining loss reads.

    Args:
        source_dir: Directory with `config.json` and `model.safetensors` or `pytorch_model.bin` (sharded or not; the
            latter is read with `weights_only=True`), perhaps with tokenizer files, which are copied.
        output_dir: Directory to write.

    Returns:
        The model as saved.

    Raises:
        FileNotFoundError: If `config.json` or the weights are missing.
        OSError: If the weights cannot be read.
        ValueError: If they are not a released m3BERT checkpoint.
    """
    source = Path(source_dir)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json.")
    config = convert_released_config(json.loads((source / "config.json").read_text()))
    state_dict = convert_released_state_dict(_read_weights(source))
    config.dtype = next(iter(state_dict.values())).dtype
    with torch.device("meta"):
        model = M3BertForMaskedLM(config)
    expected = model.state_dict()
    if config.tie_word_embeddings:
        state_dict.setdefault("decoder.weight", state_dict["model.embeddings.word_embeddings.weight"])
    wrong = [
        f"{name}: expected {list(expected[name].shape) if name in expected else 'nothing'}, "
        f"got {list(state_dict[name].shape) if name in state_dict else 'nothing'}"
        for name in sorted(expected.keys() | state_dict.keys())
        if name not in expected or name not in state_dict or expected[name].shape != state_dict[name].shape
    ]
    if wrong:
        raise ValueError(f"The weights do not fit config.json in {len(wrong)} tensors: {'; '.join(wrong[:3])}.")
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    model.save_pretrained(output_dir)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, Path(output_dir) / name)
    return model.eval()
