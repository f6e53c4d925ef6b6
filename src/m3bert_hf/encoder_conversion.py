"""Start pretraining from another encoder: BERT, XLM-R (RoBERTa) or ModernBERT, as far as its tensors fit."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .configuration_m3bert import M3BertConfig
from .modeling_m3bert import M3BertForMaskedLM


Tensors = dict[str, torch.Tensor]


def _post_norm(weights: Tensors, prefix: str, head: dict[str, str], offset: int) -> Tensors:
    """Rename BERT's and RoBERTa's tensors. Their norms come after each sum, ours before each part: not the same."""
    positions = weights[f"{prefix}.embeddings.position_embeddings.weight"][offset:]
    token_types = weights.get(f"{prefix}.embeddings.token_type_embeddings.weight")
    if token_types is not None:
        # Every input has type 0: added to the positions, the embeddings sum up to what they did.
        positions = positions + token_types[0]
    renamed = {
        "model.embeddings.word_embeddings.weight": weights[f"{prefix}.embeddings.word_embeddings.weight"],
        "model.embeddings.position_embeddings.weight": positions,
        "model.embeddings.norm.weight": weights[f"{prefix}.embeddings.LayerNorm.weight"],
    }
    names = {
        "attention.self.query": "self_attn.q_proj",
        "attention.self.key": "self_attn.k_proj",
        "attention.self.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.o_proj",
        # The half of SwiGLU that the activation acts on.
        "intermediate.dense": "mlp.gate_proj",
        "output.dense": "mlp.down_proj",
    }
    for key, tensor in weights.items():
        match = re.fullmatch(rf"{prefix}\.encoder\.layer\.(\d+)\.(.+)\.weight", key)
        if match and match[2] in names:
            renamed[f"model.layers.{match[1]}.{names[match[2]]}.weight"] = tensor
    renamed.update({ours: weights[theirs] for ours, theirs in head.items() if theirs in weights})
    return renamed


def _from_bert(weights: Tensors) -> Tensors:
    head = {
        "head.dense.weight": "cls.predictions.transform.dense.weight",
        "head.dense.bias": "cls.predictions.transform.dense.bias",
        "head.norm.weight": "cls.predictions.transform.LayerNorm.weight",
        "decoder.weight": "cls.predictions.decoder.weight",
        "decoder.bias": "cls.predictions.bias",
    }
    return _post_norm(weights, "bert", head, 0)


def _from_roberta(weights: Tensors) -> Tensors:
    head = {
        "head.dense.weight": "lm_head.dense.weight",
        "head.dense.bias": "lm_head.dense.bias",
        "head.norm.weight": "lm_head.layer_norm.weight",
        "decoder.weight": "lm_head.decoder.weight",
        "decoder.bias": "lm_head.bias",
    }
    # RoBERTa counts positions from its padding id 1 plus one.
    return _post_norm(weights, "roberta", head, 2)


def _from_modernbert(weights: Tensors) -> Tensors:
    renamed = {
        "model.embeddings.word_embeddings.weight": weights["model.embeddings.tok_embeddings.weight"],
        "model.embeddings.norm.weight": weights["model.embeddings.norm.weight"],
        "model.norm.weight": weights["model.final_norm.weight"],
        "head.dense.weight": weights["head.dense.weight"],
        "head.norm.weight": weights["head.norm.weight"],
        "decoder.weight": weights["decoder.weight"],
    }
    if "decoder.bias" in weights:
        renamed["decoder.bias"] = weights["decoder.bias"]
    names = {
        "attn_norm": ("input_layernorm",),
        "attn.Wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.Wo": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.Wi": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.Wo": ("mlp.down_proj",),
    }
    for key, tensor in weights.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", key)
        if match and match[2] in names:
            ours = names[match[2]]
            for name, part in zip(ours, tensor.chunk(len(ours)), strict=True):
                renamed[f"model.layers.{match[1]}.{name}.weight"] = part
    return renamed


_SOURCES: dict[str, Callable[[Tensors], Tensors]] = {
    "bert": _from_bert,
    "xlm-roberta": _from_roberta,
    "roberta": _from_roberta,
    "modernbert": _from_modernbert,
}


def derive_config(source: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> M3BertConfig:
    """Return the configuration of an m3BERT of another encoder's shape.

    Args:
        source: Configuration of a BERT, XLM-R, RoBERTa or ModernBERT.
        tokenizer: Of the new model, whose special tokens it takes.
        fields: Of [`M3BertConfig`], over those of the source.
    """
    values: dict[str, Any] = {
        name: getattr(source, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "initializer_range",
            "tie_word_embeddings",
        )
    }
    if source.model_type == "modernbert":
        values["hidden_act"] = source.hidden_activation
        values["position_embedding_type"] = "rotary"
        values["rope_parameters"] = {kind: dict(own) for kind, own in source.rope_parameters.items()}
        values["layer_types"] = list(source.layer_types)
        values["local_attention"] = source.local_attention
    else:
        values["hidden_act"] = source.hidden_act
        if "roberta" in source.model_type:
            values["max_position_embeddings"] -= 2
    values["vocab_size"] = max(len(tokenizer), values["vocab_size"])
    for name in ("pad", "bos", "eos", "cls", "sep"):
        values[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    if "layer_types" in values and fields.get("num_hidden_layers"):
        values["layer_types"] = values["layer_types"][: fields["num_hidden_layers"]]
    return M3BertConfig(**{**values, **fields})


def initialize_from(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any] | None = None
) -> tuple[M3BertForMaskedLM, str | None]:
    """Make a model from a checkpoint: of m3BERT as it is, of BERT, XLM-R, RoBERTa or ModernBERT as far as it fits.

    From another architecture, every tensor whose place and shape exist in the new model is carried over: embeddings
    (by token, if the vocabularies differ), positions, attention, what corresponds in the feed-forward layers, and the
    masked-language-model head. Biases, and norms that are in other places, have no place here. The result is a start
    for pretraining and nothing to be used as it is.

    Args:
        source: Checkpoint directory or Hub name.
        tokenizer: Of the new model.
        fields: Of [`M3BertConfig`], over those that follow from the source; `num_hidden_layers` takes the first ones.

    Returns:
        The model; and for another architecture a report of what was carried over, what is new, and what was left.

    Raises:
        ValueError: If the architecture is not one of these.
    """
    fields = dict(fields or {})
    config = AutoConfig.from_pretrained(source)
    if config.model_type == "m3bert":
        return M3BertForMaskedLM.from_pretrained(source, **fields), None
    if config.model_type not in _SOURCES:
        raise ValueError(
            f"init_from={str(source)!r} is a {config.model_type!r} model: only m3bert, {', '.join(_SOURCES)} can be "
            "started from."
        )
    theirs = AutoModelForMaskedLM.from_pretrained(source)
    weights = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    renamed = _SOURCES[config.model_type](weights)
    model = M3BertForMaskedLM(derive_config(config, tokenizer, **fields))
    state = model.state_dict()
    shared = _shared_tokens(source, tokenizer)
    carried: list[str] = []
    notes: list[str] = []
    for name, tensor in renamed.items():
        own = state.get(name)
        if own is None:
            continue
        if shared is not None and name in (
            "model.embeddings.word_embeddings.weight",
            "decoder.weight",
            "decoder.bias",
        ):
            new, old = shared
            if own.shape[1:] == tensor.shape[1:]:
                own[new] = tensor[old].to(own.dtype)
                carried.append(name)
                notes.append(f"{name}: the rows of {len(new):,} of {len(tokenizer):,} tokens")
        elif own.shape == tensor.shape:
            own.copy_(tensor)
            carried.append(name)
        elif name.endswith("position_embeddings.weight") and own.shape[1] == tensor.shape[1]:
            common = min(len(own), len(tensor))
            own[:common] = tensor[:common]
            carried.append(name)
            notes.append(f"{name}: the first {common} of {len(own)} positions")
    tied = {"decoder.weight"} if model.config.tie_word_embeddings else set()
    new_names = sorted(set(state) - set(carried) - tied)
    left = sorted(set(weights) - _used(weights, renamed, carried))
    size = sum(state[name].numel() for name in set(carried) - tied)
    total = sum(tensor.numel() for name, tensor in state.items() if name not in tied)
    lines = [
        f"Started from {source} ({config.model_type}): {len(carried)} tensors carried over, {size / total:.1%} of the "
        "new model's parameters.",
        *notes,
        f"New, at their initial values: {_summary(new_names)}.",
        f"Left behind: {_summary(left)}.",
    ]
    if config.model_type == "modernbert":
        lines.append("LayerNorm became RMSNorm with the same weights.")
    return model, "\n".join(lines)


def _shared_tokens(source, tokenizer) -> tuple[list[int], list[int]] | None:
    """Return the ids of tokens that both vocabularies have, ours and theirs; `None` if they are the same."""
    theirs = AutoTokenizer.from_pretrained(source).get_vocab()
    ours = tokenizer.get_vocab()
    if ours == theirs:
        return None
    pairs = sorted((new, theirs[token]) for token, new in ours.items() if token in theirs)
    return [new for new, _ in pairs], [old for _, old in pairs]


def _used(weights: Tensors, renamed: Tensors, carried: list[str]) -> set[str]:
    """Return the source's tensors that share memory with what was carried over, or were added to it."""
    pointers = {renamed[name].untyped_storage().data_ptr() for name in carried}
    used = {name for name, tensor in weights.items() if tensor.untyped_storage().data_ptr() in pointers}
    if "model.embeddings.position_embeddings.weight" in carried:
        used |= {n for n in weights if n.endswith(("position_embeddings.weight", "token_type_embeddings.weight"))}
    return used


def _summary(names: list[str]) -> str:
    """List names, those of the layers once for all layers."""
    kinds = {re.sub(r"(layers?)\.\d+\.", r"\1.*.", name): None for name in names}
    return json.dumps(list(kinds))[1:-1].replace('"', "") or "nothing"


__all__ = ["derive_config", "initialize_from"]
