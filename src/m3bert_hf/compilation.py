"""`torch.compile` for serving: what lies between the matrix products and attention, fused, for any number of tokens.

Servers that compile a whole model pad their batches to a few lengths, since each shape is compiled by itself. Here the
pieces between two attentions are compiled instead, which see a list of tokens whose number is symbolic: one graph for
every batch, padded or packed, and nothing is padded to a bucket. Attention itself, and the packing whose control flow
depends on the data, stay as they are. Small inputs take the plain path, so that a single query does not pay for the
checks before each compiled call; from how many tokens on was not tuned.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from .modeling_m3bert import M3BertAttention, M3BertLayer, M3BertModel, M3BertRMSNorm
from .repetition_m3bert import RepeatedTokens


Model = TypeVar("Model", bound=nn.Module)


class _FromTokens:
    """In place of a module's method: the compiled function from a number of tokens on, else the plain one."""

    def __init__(self, module: nn.Module, plain: Callable, compiled: Callable, at_least: int):
        self.module, self.plain, self.compiled, self.at_least = module, plain, compiled, at_least

    def __getstate__(self) -> dict[str, Any]:
        # What dynamo made belongs to this process: a copy in another one (encoding in several) takes the plain path.
        return {**vars(self), "compiled": self.plain}

    def __call__(self, hidden_states: torch.Tensor, *arguments):
        tokens = hidden_states.shape[:-1].numel()
        # Training has TrainingArguments.torch_compile, and a compiled graph inside another would be compiled twice.
        if tokens < self.at_least or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.plain(self.module, hidden_states, *arguments)
        # Leaving out repeated tokens would make a graph of its own.
        arguments = tuple(None if isinstance(value, RepeatedTokens) else value for value in arguments)
        return self.compiled(self.module, hidden_states, *arguments)


def compile_encoder(model: Model, at_least: int = 512, warm_up: bool = True, **options: Any) -> Model:
    """Compile the layers of every m3BERT encoder within a model for inference, in place.

    One graph of each piece serves all layers, exits and batches, and is kept in inductor's cache for the next
    process. A copy of the model in another process, as for encoding in several, takes the plain path. Weights,
    names and what is saved stay as they are; results differ from the plain path by rounding. `docs/deployment.md`
    has what it gains.

    Args:
        model: An encoder, a model with a head, or a `SentenceTransformer`.
        at_least: Tokens of a batch from which on the compiled pieces are used.
        warm_up: Compile now, by running the encoder, rather than at the first batch.
        **options: Of `torch.compile`, such as `backend` or `mode`.

    Returns:
        The same model.

    Raises:
        ValueError: If the model holds no m3BERT encoder, or its weights are prepacked by `prepack_weights`.
        RuntimeError: If compilation fails, as it does on a CPU without a C++ compiler; the model is then as before.
    """
    encoders = [module for module in model.modules() if isinstance(module, M3BertModel)]
    if not encoders:
        raise ValueError(f"{type(model).__name__} holds no m3BERT encoder to compile.")
    for encoder in encoders:
        if any(not isinstance(vars(layer).get("feed_forward"), _FromTokens | None) for layer in encoder.layers):
            raise ValueError("The weights are prepacked, which takes the same places: undo_prepacking(model) first.")
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        # Otherwise all models of a process share the eight graphs that dynamo makes of a function before it gives up.
        options.setdefault("isolate_recompiles", True)
    feed_forward, project, norm = (
        torch.compile(plain, dynamic=True, **options)
        for plain in (M3BertLayer.feed_forward, M3BertAttention.project, M3BertRMSNorm.forward)
    )
    for encoder in encoders:
        layer: Any
        for layer in encoder.layers:
            attention, first = layer.self_attn, layer.input_layernorm
            if not isinstance(vars(layer).get("feed_forward"), _FromTokens | None):
                raise ValueError(
                    "The weights are prepacked, which takes the same places: undo_prepacking(model) first."
                )
            # The other norm is part of the feed-forward's graph.
            for module, name, plain, compiled in (
                (layer, "feed_forward", M3BertLayer.feed_forward, feed_forward),
                (attention, "project", M3BertAttention.project, project),
                (first, "forward", M3BertRMSNorm.forward, norm),
            ):
                setattr(module, name, _FromTokens(module, plain, compiled, at_least))
    if warm_up:
        try:
            for encoder in encoders:
                _warm_up(encoder, at_least)
        except Exception as error:
            for encoder in encoders:
                undo_compilation(encoder)
            # What follows the first paragraph is advice on debugging inductor.
            cause = " ".join(str(error).split("\n\n")[0].split())
            raise RuntimeError(
                f"The encoder could not be compiled ({type(error).__name__}: {cause}). torch.compile needs a C++ "
                "compiler on a CPU and Triton on a GPU; the model runs without it."
            ) from error
    return model


def undo_compilation(model: nn.Module) -> None:
    """Take [`compile_encoder`] back; a model that was not compiled stays as it is."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, _FromTokens):
                delattr(module, name)


def _warm_up(encoder: M3BertModel, at_least: int) -> None:
    """Run a padded and a packed batch, the two shapes of hidden states, in both modes that inference runs in."""
    config = encoder.config
    # A size that equals another would be taken for the same symbol, and the graph be bound to their equality.
    taken = {config.hidden_size, config.intermediate_size, config.num_attention_heads, 2 * config.hidden_size}
    longest = config.max_input_length
    length = next(size for size in range(min(longest, 37), 0, -1) if size not in taken)
    rows = next(size for size in range(max(3, -(-3 * at_least // length)), 10**9) if size not in {*taken, length})
    training = encoder.training
    encoder.eval()
    try:
        ids = torch.zeros(rows, length, dtype=torch.long, device=encoder.device)
        mask = torch.ones_like(ids)
        packed = mask.clone()
        packed[1:, length // 2 :] = 0
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                encoder(ids, attention_mask=mask)
                encoder(ids, attention_mask=packed)
    finally:
        encoder.train(training)


__all__ = ["compile_encoder", "undo_compilation"]
