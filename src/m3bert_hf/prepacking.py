"""Weights laid out once as a CPU multiplies them, in place of anew in every call.

A product on a CPU begins by copying its weights into blocks that fit the caches. That takes a tenth to a fifth of
the time of a batch and up to half of that of a query, and gives the same copy each time. oneDNN can keep it, which
inductor makes use of when it freezes a model; that takes a C++ compiler and a graph for each layer. The two
operators that inductor calls are called here directly: nothing is compiled, and one copy serves every exit, batch
and length. They are not among torch's public ones, so their result is compared with the plain product before they
are used.
"""

import functools
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .modeling_m3bert import M3BertAttention, M3BertLayer, M3BertMLP, M3BertModel, apply_rotary_pos_emb


Model = TypeVar("Model", bound=nn.Module)
# A query of a model with smaller matrices is over before packing gains what the checks before it cost.
_LARGE_MATRIX, _MANY_TOKENS = 2**18, 64
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


@dataclass
class _Kept:
    """Packed weights, and by what to see that they are still those of the model."""

    versions: list[tuple]
    # The first row of each as it is and as it was.
    rows: list[tuple[torch.Tensor, torch.Tensor]]
    # While these are held, other weights cannot come to lie at their addresses.
    weights: list[torch.Tensor]
    packed: torch.Tensor


class _PrepackedLinear:
    """Linear layers without bias that read the same input, as one product.

    The weights are packed when they are first used, so that layers above the exit are not, and anew when they change.
    """

    def __init__(self, parent: nn.Module, *names: str):
        self.parent, self.names = parent, names
        # What the weights were, and what was packed of them; one attribute, since threads that encode share it.
        self.kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The layout is opaque and cannot be copied: another process, or a copy of the model, packs its own.
        return {**vars(self), "kept": None}

    @property
    def linears(self) -> list[Any]:
        return [getattr(self.parent, name) for name in self.names]

    def weight(self) -> torch.Tensor:
        """Return the packed weights [sum of the outputs, inputs]."""
        weights = [linear.weight for linear in self.linears]
        versions = [(w.data_ptr(), w._version, w.dtype, w.shape, w.stride()) for w in weights]
        kept = self.kept
        # Changes through `.data`, as of an adapter that is merged, count no version; they change the first row too.
        if kept is not None and kept.versions == versions and all(torch.equal(now, then) for now, then in kept.rows):
            return kept.packed
        together = weights[0] if len(weights) == 1 else torch.cat(weights)
        packed = torch.ops.mkldnn._reorder_linear_weight(together.detach())
        rows = [(row, row.clone()) for row in (w.detach()[0] for w in weights)]
        self.kept = _Kept(versions, rows, [w.detach() for w in weights], packed)
        return packed

    def __call__(self, inputs: torch.Tensor, activation: str = "none") -> torch.Tensor:
        """Return the product, after an activation that oneDNN applies while it is in the cache."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight(), None, activation, [], "")

    def add(self, inputs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return `other` plus the product."""
        return torch.ops.mkldnn._linear_pointwise.binary(inputs, other, self.weight(), None, "add")


@functools.cache
def _fault(dtype: torch.dtype) -> str | None:
    """Return why products of a dtype cannot be made with packed weights on this machine, `None` if they can."""
    if dtype not in (torch.float32, torch.bfloat16):
        return "only float32 and bfloat16 can"
    parent = nn.ModuleDict({"linear": nn.Linear(96, 80, bias=False, device="meta")})
    linear = _PrepackedLinear(parent, "linear")
    # Also where this is called in inference mode, whose tensors count no changes.
    with torch.inference_mode(False), torch.no_grad():
        values = torch.arange(80.0 * 96, dtype=torch.float32, device="cpu")
        weight, inputs = values.sin().view(80, 96).to(dtype), values[: 5 * 96].cos().view(5, 96).to(dtype)
        parent["linear"].weight = nn.Parameter(weight)
        others = torch.ones_like(inputs[:, :80])
        try:
            found = torch.stack([linear(inputs), linear(inputs, "swish"), linear.add(inputs, others)]).double()
        except (AttributeError, RuntimeError) as error:
            return str(error).split("\n")[0]
        product = F.linear(inputs.double(), weight.double())
        off = float((found - torch.stack([product, F.silu(product), 1.0 + product])).abs().max())
        # The setting of torch.set_float32_matmul_precision makes the plain product less exact as well.
        plain = float((F.linear(inputs, weight).double() - product).abs().max())
    allowed = 4 * plain + 8 * torch.finfo(dtype).eps * float(product.abs().max())
    return None if off <= allowed else f"a product is off by {off:.2g}, the plain one by {plain:.2g}"


def _is_plain(linear: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing but that: no adapter, quantised weight, pruning or hook."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and type(linear.weight) is nn.Parameter
        and not linear._forward_pre_hooks
        and not linear._forward_hooks
        and isinstance(vars(linear).get("forward"), _Output | None)
    )


def _fits(inputs: torch.Tensor, parent: nn.Module, linears: list[Any]) -> bool:
    """Whether packed weights stand for the plain ones: not for training, graphs, autocast and other devices."""
    return (
        # Of the tensor class itself: those of tracers are others.
        type(inputs) is torch.Tensor
        and not torch.is_grad_enabled()
        and not parent.training
        and inputs.device.type == "cpu"
        and inputs.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
        and _fault(inputs.dtype) is None
        and all(_is_plain(linear) for linear in linears)
        # Weights made in inference mode count no changes.
        and all(w.dtype == inputs.dtype and not w.is_inference() for w in (linear.weight for linear in linears))
    )


def _gains(inputs: torch.Tensor, linear: nn.Linear) -> bool:
    return linear.weight.numel() >= _LARGE_MATRIX or inputs.numel() >= _MANY_TOKENS * inputs.shape[-1]


class _Projections:
    """In place of `M3BertAttention.project`: queries, keys and values in one product."""

    def __init__(self, module: M3BertAttention):
        self.module, self.linear = module, _PrepackedLinear(module, "q_proj", "k_proj", "v_proj")

    def __call__(self, hidden_states, position_embeddings=None, repeated=None):
        module: Any = self.module
        if not _fits(hidden_states, module, self.linear.linears):
            self.linear.kept = None
            return M3BertAttention.project(module, hidden_states, position_embeddings, repeated)
        if not _gains(hidden_states, module.q_proj):
            return M3BertAttention.project(module, hidden_states, position_embeddings, repeated)
        selected = None if repeated is None else repeated.select(hidden_states)
        states = self.linear(hidden_states) if selected is None else repeated.spread(self.linear(selected))
        heads = states.view(*hidden_states.shape[:-1], -1, module.head_dim).transpose(1, 2)
        keys = module.k_proj.out_features // module.head_dim
        both, value = heads.split([heads.shape[1] - keys, keys], dim=1)
        if position_embeddings is not None:
            both = apply_rotary_pos_emb(both, *position_embeddings)
        query, key = both.split([both.shape[1] - keys, keys], dim=1)
        return query, key, value


class _Output:
    """In place of the forward of attention's last linear layer."""

    def __init__(self, attention: M3BertAttention):
        self.module, self.linear = attention.o_proj, _PrepackedLinear(attention, "o_proj")

    def __call__(self, inputs):
        if not _fits(inputs, self.linear.parent, self.linear.linears):
            self.linear.kept = None
            # Within an adapter, this is the layer that it adds to.
            return nn.Linear.forward(self.module, inputs)
        return self.linear(inputs) if _gains(inputs, self.module) else nn.Linear.forward(self.module, inputs)


class _FeedForward:
    """In place of `M3BertLayer.feed_forward`: the gate's activation and the residual sum are part of the products."""

    def __init__(self, module: M3BertLayer):
        self.module, self.mlp = module, module.mlp
        names = ("gate_proj", "up_proj", "down_proj")
        self.parts = [_PrepackedLinear(module.mlp, name) for name in names]

    def _fits(self, hidden_states) -> bool:
        layer: Any = self.module
        mlp = layer.mlp
        return (
            mlp is self.mlp
            and type(mlp) is M3BertMLP
            and not mlp._forward_pre_hooks
            and not mlp._forward_hooks
            and not layer.dropout.training
            and _fits(hidden_states, layer, [mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        )

    def __call__(self, hidden_states, attended):
        layer: Any = self.module
        if not self._fits(hidden_states):
            for part in self.parts:
                part.kept = None
            return M3BertLayer.feed_forward(layer, hidden_states, attended)
        if not _gains(hidden_states, layer.mlp.up_proj):
            return M3BertLayer.feed_forward(layer, hidden_states, attended)
        gate, up, down = self.parts
        hidden_states = hidden_states + attended
        normed = layer.post_attention_layernorm(hidden_states)
        if isinstance(layer.mlp.act_fn, _SILU):
            gated = gate(normed, "swish").mul_(up(normed))
        else:
            gated = layer.mlp.act_fn(gate(normed)) * up(normed)
        return down.add(gated, hidden_states)


_REPLACEMENTS = (_Projections, _Output, _FeedForward)


def prepack_weights(model: Model) -> Model:
    """Lay the weights of every m3BERT layer within a model out for inference on a CPU, in place.

    Batches take up to an eighth less time and single queries up to half (`docs/deployment.md`), for a second copy of
    the weights of the layers that run and for code that oneDNN keeps for each new number of tokens: a process that
    encodes batches of ever new sizes grows, by 1 to 2 MiB a size. Results differ from the plain path by rounding.
    Parameters, their names and what is saved stay as they are; weights that are loaded, trained, cast or merged with
    an adapter are packed anew.
    Training, autocast, export, adapters and other devices take the plain path. Changes through a weight's `.data` are
    seen by its first row: after one that leaves that row as it is, call this again.

    Args:
        model: An encoder, a model with a head, or a `SentenceTransformer`, on a CPU.

    Returns:
        The same model.

    Raises:
        ValueError: If the model holds no m3BERT encoder, is not on a CPU, has adapters or quantised layers, or is
            compiled by `compile_encoder`.
        RuntimeError: If this build of torch or this processor cannot multiply packed weights of the model's dtype; the
            model is then as before.
    """
    encoders = [module for module in model.modules() if isinstance(module, M3BertModel)]
    if not encoders:
        raise ValueError(f"{type(model).__name__} holds no m3BERT encoder whose weights could be packed.")
    layers: list[Any] = [layer for encoder in encoders for layer in encoder.layers]
    for layer in layers:
        if "feed_forward" in vars(layer) and not isinstance(layer.feed_forward, _FeedForward):
            raise ValueError("The encoder is compiled, which takes the same places: undo_compilation(model) first.")
        for name, part in (*layer.self_attn.named_children(), *layer.mlp.named_children()):
            if not name.endswith("_proj"):
                continue
            if not _is_plain(part):
                raise ValueError(
                    f"{name} ({type(part).__name__}) is more than a linear layer: merge an adapter into its weights "
                    "first (peft's merge_and_unload) and remove hooks; quantised layers cannot be packed."
                )
            if part.weight.device.type != "cpu":
                raise ValueError(f"Weights are packed for a CPU, the model is on {part.weight.device}.")
        dtype = layer.mlp.up_proj.weight.dtype
        fault = _fault(dtype)
        if fault is not None:
            raise RuntimeError(
                f"Weights in {dtype} cannot be packed here ({fault}): it takes a torch that was built with oneDNN and "
                "a processor that multiplies this dtype. The model runs without it."
            )
    for layer in layers:
        attention = layer.self_attn
        layer.feed_forward, attention.project = _FeedForward(layer), _Projections(attention)
        attention.o_proj.forward = _Output(attention)
    return model


def undo_prepacking(model: nn.Module) -> None:
    """Take [`prepack_weights`] back and free the packed weights; other models stay as they are."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, _REPLACEMENTS):
                delattr(module, name)


__all__ = ["prepack_weights", "undo_prepacking"]
