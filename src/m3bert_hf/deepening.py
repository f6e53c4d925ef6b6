"""More layers for a checkpoint, without a change of what it computes: where deeper exits start from a shallow one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .modeling_m3bert import M3BertLayer, M3BertModel
from .sentence_transformer import M3BertSentenceTransformer, build_sentence_transformer


def deepen(
    model_name_or_path: str | Path, output_dir: str | Path, exit_layers: Sequence[int], seed: int = 0
) -> M3BertSentenceTransformer:
    """Append layers that pass their input on, so that the new exits begin as copies of the deepest old one.

    The output projections of the new layers (`o_proj`, `down_proj`) are zero, the rest is initialised as in a new
    model: a layer adds nothing to the residual stream until training moves its projections, which get gradients from
    the first step on. Identity blocks are those of LLaMA Pro (arXiv 2401.02415); to train the shallow model first, at
    a fraction of the cost, is progressive stacking (Gong et al., ICML 2019).

    Args:
        model_name_or_path: Checkpoint of transformers or sentence-transformers; a masked-language head is left out.
        output_dir: Directory to write, a sentence-transformers checkpoint.
        exit_layers: Exits to add, all of them above the deepest layer; the last is the new depth.
        seed: Of the new layers' weights.

    Returns:
        The deepened model.

    Raises:
        ValueError: If an exit is not above the present depth; if the model's exits are not normed alike
            (`exit_norm="last"`), since the old deepest one would lose its norm; or if its `layer_types` follow no
            pattern that could go on.
    """
    model = build_sentence_transformer(str(model_name_or_path))
    encoder: Any = model.transformers_model
    config = encoder.config
    present = config.num_hidden_layers
    added = sorted(set(exit_layers))
    if not added or added[0] <= present:
        raise ValueError(
            f"exit_layers={list(exit_layers)} must lie above the model's {present} layers: those it has are "
            f"{list(config.exit_layers)}."
        )
    if config.exit_norm == "last":
        raise ValueError(
            f"exit_norm='last' norms the deepest exit alone, so that exit {present} would change: set "
            "exit_norm='shared' first."
        )
    deeper = type(config).from_dict(
        {
            **config.to_dict(),
            "num_hidden_layers": added[-1],
            "exit_layers": [*config.exit_layers, *added],
            "layer_types": None,
            "exit_layer": None,
        }
    )
    if list(deeper.layer_types[:present]) != list(config.layer_types):
        raise ValueError(f"layer_types={config.layer_types} do not go on in a pattern that the configuration knows.")
    attention = config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bigger: Any = M3BertModel(deeper)
        bigger = bigger.to(dtype=encoder.dtype)
    bigger.load_state_dict(encoder.state_dict(), strict=False)
    with torch.no_grad():
        for layer in bigger.layers[present:]:
            assert isinstance(layer, M3BertLayer)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    bigger.set_attn_implementation(attention)
    first: Any = model[0]
    first.model = bigger.to(encoder.device).train(encoder.training)
    model.save_pretrained(str(output_dir), create_model_card=False)
    # What was written, not what was cast: in half precision, rotary frequencies stay in float32.
    return build_sentence_transformer(str(output_dir))


__all__ = ["deepen"]
