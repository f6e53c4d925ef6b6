"""What a training step computes, and what the machine can: floating-point operations and matrix rate."""

import ctypes
import time

import torch

from .configuration_m3bert import M3BertConfig


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.3) -> float:
    """Measure the rate of large matrix products in operations per second.

    Args:
        device: Where to multiply.
        dtype: Of the factors.
        size: Rows and columns; `None` is 2048 on a CPU and 8192 elsewhere.
        seconds: How long to measure, after one product to warm up.

    Returns:
        Operations per second of the fastest product (2 for each multiplication and addition).
    """
    size = size or (2048 if device.type == "cpu" else 8192)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> float:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    multiply()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, multiply())
    return 2 * size**3 / best


def backbone_operations(config: M3BertConfig, tokens: int, attended: int) -> int:
    """Count the floating-point operations of forward and backward through all layers.

    Args:
        config: Of the model.
        tokens: Tokens, padding included.
        attended: Pairs of tokens of which one may attend to the other, summed over rows; local layers count the same.

    Returns:
        6 operations for each weight and token and for each pair of tokens and dimension (forward, and twice that
        backward; Kaplan et al., arXiv 2001.08361).
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    key_value = hidden // heads * (config.num_key_value_heads or heads)
    weights = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * config.intermediate_size
    return 6 * config.num_hidden_layers * (weights * tokens + 2 * hidden * attended)


def decoder_operations(vocab_size: int, scored: float) -> float:
    """Count the operations of the multigranular loss: 6 for each class and each dimension of each scored token.

    Args:
        vocab_size: Classes.
        scored: Dimensions summed over scored tokens and granularities.
    """
    return 6.0 * vocab_size * scored


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next step instead of returning it to the system.

    The gradients of a large vocabulary are freed and allocated anew with every step, and the system clears each page
    of them again: on a CPU, a third of the time of a step at base size. What is gained costs no peak memory, but the
    process holds its peak until it ends.

    Returns:
        Whether the C library could be told (glibc only).
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))


__all__ = ["backbone_operations", "decoder_operations", "keep_freed_memory", "matrix_rate"]
