"""The multigranular masked-language-model loss: one cross entropy for every (exit layer, first d dimensions).

The decoder is by far the largest matrix product of the model (250,002 classes in the base size), so its logits are
computed for labelled tokens only and in blocks that are thrown away: memory depends on the block size, not on the
vocabulary and not on the number of granularities.
"""

from collections.abc import Sequence

import torch
from torch import nn


IGNORE_INDEX = -100
# A block of float32 logits of at most 512 x 8192 is 16 MiB: small beside the weights of any model, large enough for
# the matrix products to run at full rate.
_TOKENS_PER_BLOCK = 512
_CLASSES_PER_BLOCK = 8192


def _blocks(size: int, block: int):
    return ((start, min(start + block, size)) for start in range(0, size, block))


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross entropy of `features[g] @ weight[:, :d_g].T + bias`, for each granularity g."""

    @staticmethod
    def forward(ctx, labels, weight, bias, compute_dtype, *features):
        classes = weight.shape[0]
        sums, normalizers = [], []
        for x in features:
            x = x.to(compute_dtype)
            lse = x.new_empty(x.shape[0], dtype=torch.float32)
            target = torch.zeros_like(lse)
            for t0, t1 in _blocks(x.shape[0], _TOKENS_PER_BLOCK):
                running = None
                for c0, c1 in _blocks(classes, _CLASSES_PER_BLOCK):
                    logits = _logits(x[t0:t1], weight[c0:c1, : x.shape[1]], bias[c0:c1], compute_dtype)
                    part = torch.logsumexp(logits, dim=1)
                    running = part if running is None else torch.logaddexp(running, part)
                    inside = (labels[t0:t1] >= c0) & (labels[t0:t1] < c1)
                    rows = inside.nonzero(as_tuple=True)[0]
                    target[t0 + rows] = logits[rows, labels[t0:t1][rows] - c0]
                if running is not None:
                    lse[t0:t1] = running
            sums.append((lse - target).sum())
            normalizers.append(lse)
        ctx.save_for_backward(labels, weight, bias, *normalizers, *features)
        ctx.compute_dtype = compute_dtype
        return torch.stack(sums)

    @staticmethod
    def backward(ctx, grad_sums):
        labels, weight, bias, *saved = ctx.saved_tensors
        count = len(saved) // 2
        normalizers, features = saved[:count], saved[count:]
        dtype = ctx.compute_dtype
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in features]
        inputs = [x.to(dtype) for x in features]
        # Classes outermost: a block of the decoder is read, and its gradient written, once for all granularities.
        for c0, c1 in _blocks(weight.shape[0], _CLASSES_PER_BLOCK):
            for g, x in enumerate(inputs):
                block = weight[c0:c1, : x.shape[1]].to(dtype)
                for t0, t1 in _blocks(x.shape[0], _TOKENS_PER_BLOCK):
                    logits = _logits(x[t0:t1], block, bias[c0:c1], dtype)
                    probabilities = logits.sub_(normalizers[g][t0:t1, None]).exp_()
                    rows = ((labels[t0:t1] >= c0) & (labels[t0:t1] < c1)).nonzero(as_tuple=True)[0]
                    probabilities[rows, labels[t0:t1][rows] - c0] -= 1.0
                    probabilities *= grad_sums[g]
                    if grad_bias is not None:
                        grad_bias[c0:c1] += probabilities.sum(dim=0)
                    probabilities = probabilities.to(dtype)
                    grads[g][t0:t1] += (probabilities @ block).float()
                    if grad_weight is not None:
                        grad_weight[c0:c1, : x.shape[1]] += probabilities.T @ x[t0:t1]
        grads = [grad.to(x.dtype) for grad, x in zip(grads, features, strict=True)]
        return None, grad_weight, grad_bias, None, *grads


def _logits(x, weight, bias, dtype):
    return torch.addmm(bias.to(dtype), x, weight.to(dtype).T).float()


def linear_cross_entropy(
    features: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the summed cross entropy of each granularity without ever holding its logits.

    Args:
        features: One tensor [tokens, d_g] per granularity g, what the decoder reads.
        weight: Decoder [classes, width]; granularity g uses its first d_g columns.
        bias: Decoder bias [classes].
        labels: Class of each token [tokens], int64, all within 0 and classes - 1.

    Returns:
        Sums over tokens [granularities], float32, differentiable in features, weight and bias.
    """
    device = features[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(labels, weight, bias, dtype, *features)


def select_labelled(
    labels: torch.Tensor, vocab_size: int, ignore_index: int = IGNORE_INDEX
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the flat positions of labelled tokens and their labels, both [labelled tokens].

    Args:
        labels: Labels of any shape, `ignore_index` where nothing is to be predicted.
        vocab_size: Number of classes.
        ignore_index: Label of the tokens that are not scored.

    Raises:
        ValueError: If a label is neither `ignore_index` nor within 0 and `vocab_size` - 1.
    """
    flat = labels.reshape(-1)
    positions = (flat != ignore_index).nonzero(as_tuple=True)[0]
    targets = flat[positions]
    if targets.numel():
        low, high = (int(value) for value in torch.aminmax(targets))
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"Label {low if low < 0 else high} is outside the vocabulary: labels must be within 0 and "
                f"{vocab_size - 1}, or {ignore_index} for tokens that are not predicted."
            )
    return positions, targets


def multigranular_mlm_loss(
    exit_hidden_states: Sequence[torch.Tensor],
    labels: torch.Tensor,
    head: nn.Module,
    decoder: nn.Linear,
    dimensions: Sequence[int],
    num_items_in_batch: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked-language-model loss of every (exit, dimension): their plain sum, as in the released pretraining.

    Each granularity (l, d) contributes the cross entropy, averaged over labelled tokens, of
    `decoder(head(exit_hidden_states[l][..., :d]))` (arXiv 2605.19568).

    Args:
        exit_hidden_states: One state [batch, tokens, width] per exit.
        labels: Labels [batch, tokens], int64, -100 for tokens that are not predicted.
        head: Maps [labelled tokens, d] to [labelled tokens, d] for every d of `dimensions`.
        decoder: Linear layer [classes, width] with bias, sliced to its first d columns.
        dimensions: Output widths d.
        num_items_in_batch: Number of labelled tokens to average over, when this call is one part of a larger batch
            (gradient accumulation, data parallelism). `None` averages over this call's own labelled tokens.

    Returns:
        The loss (a scalar; 0 if nothing is labelled) and, detached, the loss of each granularity [exits, dimensions].

    Raises:
        ValueError: If a label is outside the vocabulary.
    """
    positions, targets = select_labelled(labels, decoder.weight.shape[0])
    states = [state.reshape(-1, state.shape[-1])[positions] for state in exit_hidden_states]
    features = [head(state[:, :d]) for state in states for d in dimensions]
    sums = linear_cross_entropy(features, decoder.weight, decoder.bias, targets)
    count = max(targets.numel(), 1) if num_items_in_batch is None else num_items_in_batch
    losses = sums / count
    return losses.sum(), losses.detach().view(len(states), len(dimensions))


__all__ = ["linear_cross_entropy", "multigranular_mlm_loss", "select_labelled"]
