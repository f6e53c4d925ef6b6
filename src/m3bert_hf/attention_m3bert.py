"""Attention in bfloat16 on a CPU, faster for short texts than torch's kernel."""

import functools
from typing import Any

import torch
import torch.nn.functional as F

from .compat_m3bert import ALL_ATTENTION_FUNCTIONS, library_sdpa_attention_forward


# The most tokens of a text, since weights [tokens, tokens] exist for each head; the tokens of a batch that are too few
# for a gain; and, where nothing is kept for gradients, the weights that exist at once.
_LONGEST, _FEW_TOKENS, _WEIGHTS_AT_ONCE = 256, 64, 2**20
# What changes the result of transformers' function beside its tensors.
_OPTIONS = ("is_causal", "position_bias", "cache", "softcap", "output_attentions")


@functools.cache
def _has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16; where it does not, torch's batched product of it is a plain loop."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.backends.mkldnn.is_available() and any(getattr(torch.cpu, name, bool)() for name in checks)


def _is_short(dtype, query, mask, options) -> bool:
    """Whether to write attention out for queries of any dtype that are multiplied in `dtype`."""
    batch, _, tokens, _ = query.shape
    return (
        dtype == torch.bfloat16
        and tokens <= _LONGEST
        and batch * tokens > _FEW_TOKENS
        and (mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[0] in (1, batch)))
        and not any(options.get(name) is not None and options[name] is not False for name in _OPTIONS)
        and bool(torch.backends.mkldnn.enabled)
        and _has_bfloat16_products()
    )


def sdpa_attention_forward(module, query, key, value, attention_mask, **options):
    """Attention by the function registered as "sdpa", or written out where that is faster.

    SDPA's kernel for CPUs multiplies one head after another, in bfloat16 at a tenth of the rate of a batched product:
    written out, batches of texts of 16 to 256 tokens take half the time and, with gradients, a quarter to a half
    (measured with oneDNN on a processor with bfloat16 products). The results differ by bfloat16's rounding; a query
    that may attend to nothing gets the mean of the values where SDPA gives zeros.

    Args:
        module: The attention layer, with `num_key_value_groups`.
        query: [batch, heads, tokens, head_dim].
        key: [batch, key-value heads, tokens, head_dim].
        value: Likewise.
        attention_mask: Of bool, true where a query may attend [batch or 1, 1 or heads, 1 or tokens, tokens], or
            `None`. Others go to SDPA.
        **options: `scaling`, `dropout` and what else transformers' attention functions take.

    Returns:
        Output [batch, tokens, heads, head_dim], of any strides, and `None` for the weights.
    """
    registered = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", library_sdpa_attention_forward)
    # A function that users registered is theirs to choose, and tracers see the plain graph.
    plain = registered is library_sdpa_attention_forward and type(query) is torch.Tensor
    if not plain or query.device.type != "cpu":
        return registered(module, query, key, value, attention_mask, **options)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or not _is_short(dtype, query, attention_mask, options):
        return registered(module, query, key, value, attention_mask, **options)
    batch, heads, tokens, _ = query.shape
    dropout = options.get("dropout", 0.0)
    if module.num_key_value_groups > 1:
        key = key.repeat_interleave(module.num_key_value_groups, dim=1)
        value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    # A recomputation with gradients must draw the same dropout.
    whole = torch.is_grad_enabled() or dropout > 0
    size = batch if whole else max(_WEIGHTS_AT_ONCE // (heads * tokens**2), 1)
    output: Any = None if size >= batch else query.new_empty(batch, tokens, heads, value.shape[-1], dtype=dtype)
    for start in range(0, batch, size):
        part = slice(start, start + size)
        # One matrix for each head, copied once: the batched product takes no other strides.
        queries, keys, values = (s[part].to(dtype).contiguous().flatten(0, 1) for s in (query, key, value))
        # Scaled within the product; with beta=0, nothing of the first tensor is read.
        nothing = queries.new_empty(1, 1, 1)
        weights = torch.baddbmm(nothing, queries, keys.transpose(1, 2), beta=0, alpha=options["scaling"])
        weights = weights.unflatten(0, (-1, heads))
        if attention_mask is not None:
            mask = attention_mask if attention_mask.shape[0] == 1 else attention_mask[part]
            hidden = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
            # To add is faster than to fill. The gradient of a view that is written to is copied.
            weights = weights + hidden if torch.is_grad_enabled() else weights.add_(hidden)
        # In float32 in any case: the kernel for bfloat16 computes in it, but takes what is left of a row after each 32
        # values one by one, which costs two to four times as much as both conversions for short rows.
        odd = tokens % 32 > 0 and tokens < 64
        weights = weights.softmax(dim=-1, dtype=torch.float32).to(dtype) if odd else weights.softmax(dim=-1)
        weights = F.dropout(weights, p=dropout, training=dropout > 0)
        products = torch.bmm(weights.flatten(0, 1), values).unflatten(0, (-1, heads)).transpose(1, 2)
        if size >= batch:
            return products, None
        output[part] = products
    return output, None


__all__ = ["sdpa_attention_forward"]
