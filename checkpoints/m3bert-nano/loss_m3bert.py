"""The multigranular masked-language-model loss: one cross entropy for every (exit layer, first d dimensions).

The decoder is by far the largest matrix product of the model (250,002 classes in the base size), so three things keep
it small. Only labelled tokens are scored. Their logits exist for one chunk of tokens at a time, in one buffer that all
granularities share: memory depends on the size of the chunk, not on the number of granularities. And the forward pass
computes the gradients while it has the exponentials of the chunk, so that no logit is computed twice: three matrix
products in place of four. Measured at base size on a CPU, this beats recomputing the logits in the backward pass
(`benchmarks/pretraining.py`).
"""

import functools
import importlib.util
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable


IGNORE_INDEX = -100

# Bytes of logits that exist at once. On a CPU, of a vocabulary of 250,002, 112 rows in float32 and 240 in bfloat16:
# enough for matrix products to run at three quarters of their full rate; on a GPU a product needs more rows for it.
_CPU_CHUNK = 121_000_000
_GPU_CHUNK = 2**28
# A block of classes, whose logits are written, exponentiated and summed before the next ones are touched: at most so
# much of logits (on a CPU bytes, which fit into a cache; on a GPU numbers) and so many classes.
_CPU_BLOCK, _CPU_COLUMN = 2**22, 2**13
_GPU_BLOCK, _GPU_COLUMN = 2**25, 2**15
# MKL and cuBLAS lose up to a third of their speed on rows that are not aligned.
_ALIGNMENT = 16
_LOG2_E = 1.0 / math.log(2.0)
_BACKENDS = ("auto", "torch", "inductor")


@dataclass
class MLMLossOptions:
    """What the multigranular masked-language-model loss sums, and how.

    The defaults are the released objective: the plain sum over all (exit, dimension) of the mean cross entropy over
    labelled tokens (arXiv 2605.19568). In evaluation mode only `granularities`, `granularity_weights` and `reduction`
    act, so that losses of runs with different options can be compared.

    Attributes:
        granularities: Pairs (exit layer, dimension) to train in place of the whole grid, as Starbucks does
            (arXiv 2410.13230): fewer products, and capacity for the pairs that will be used. Each must be an exit and
            a matryoshka dimension of the model.
        granularity_weights: A weight for each granularity, in the order of `granularities` (for the grid: exits
            outermost). `None` means 1 for each. Larger weights for the sizes that will be served.
        stochastic_granularities: Score each labelled token at this many granularities, drawn without repetition, each
            weighted by the inverse of its probability: the expectation is the full loss at a fraction of the decoder's
            cost. `None` scores every token at all of them.
        distillation_weight: Share in [0, 1] of the loss of each smaller granularity that is the Kullback-Leibler
            divergence from the distribution of the deepest, widest one, which is not changed by it. Smaller
            granularities then learn from what the largest finds likely and not from one label alone. Costs no further
            product with the decoder beside the teacher's own.
        label_smoothing: Share in [0, 1) of the target that is spread over all classes.
        z_loss_weight: Weight of the squared logarithm of the softmax's normaliser, which keeps logits from drifting in
            low precision (PaLM, arXiv 2204.02311, uses 1e-4).
        reduction: `"mean"` over the labelled tokens, or `"sum"`.
        backend: What runs between the matrix products. `"torch"`: one operation after another. `"inductor"`: the same,
            fused by torch.compile into kernels that read and write the logits once (needs Triton on CUDA, a C++
            compiler on a CPU). `"auto"`: `"inductor"` on CUDA where Triton is installed, else `"torch"`.
    """

    granularities: Sequence[tuple[int, int]] | None = None
    granularity_weights: Sequence[float] | None = None
    stochastic_granularities: int | None = None
    distillation_weight: float = 0.0
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"
    backend: Literal["auto", "torch", "inductor"] = "auto"

    def __post_init__(self):
        if self.granularities is not None:
            self.granularities = [(int(layer), int(dimension)) for layer, dimension in self.granularities]
            if not self.granularities or len(set(self.granularities)) != len(self.granularities):
                raise ValueError(
                    f"`granularities` must be pairs (exit layer, dimension) without repetition, got "
                    f"{self.granularities}."
                )
        for name, low, high in (
            ("distillation_weight", 0.0, 1.0),
            ("label_smoothing", 0.0, 1.0),
            ("z_loss_weight", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"`{name}` must be within {low} and {high}, got {value}.")
        for name, choices in (("reduction", ("mean", "sum")), ("backend", _BACKENDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {getattr(self, name)!r}.")

    def resolve(self, exit_layers: Sequence[int], dimensions: Sequence[int]) -> list[tuple[int, int]]:
        """Return the granularities to score for a model with these exits and dimensions.

        Raises:
            ValueError: If a granularity does not exist, or the weights or the number of drawn granularities do not
                fit.
        """
        grid = [(layer, dimension) for layer in exit_layers for dimension in dimensions]
        pairs = grid if self.granularities is None else list(self.granularities)
        missing = [pair for pair in pairs if pair not in grid]
        if missing:
            raise ValueError(
                f"Granularity {missing[0]} does not exist: exits are {list(exit_layers)}, dimensions "
                f"{list(dimensions)}. Add it to `exit_layers` and `matryoshka_dimensions` of the configuration."
            )
        if self.granularity_weights is not None and len(self.granularity_weights) != len(pairs):
            raise ValueError(
                f"`granularity_weights` has {len(self.granularity_weights)} values, but there are {len(pairs)} "
                f"granularities: {pairs}."
            )
        drawn = self.stochastic_granularities
        if drawn is not None and not 1 <= drawn <= len(pairs):
            raise ValueError(f"`stochastic_granularities` must be within 1 and {len(pairs)}, got {drawn}.")
        return pairs


@dataclass
class MLMLossOutput:
    """Result of [`multigranular_mlm_loss`].

    Attributes:
        loss: The scalar to differentiate.
        granularity_losses: Cross entropy of each granularity [exits, dimensions], float32, detached, without
            smoothing, distillation and z-loss; NaN where `MLMLossOptions.granularities` leaves it out. With stochastic
            granularities an estimate whose expectation is the loss over all tokens.
        granularity_accuracies: Share of labelled tokens whose label has the largest logit, likewise.
    """

    loss: torch.Tensor
    granularity_losses: torch.Tensor
    granularity_accuracies: torch.Tensor


@dataclass
class ScoredRows:
    """Tokens to score at one width, beside their features [rows, width].

    Attributes:
        targets: Class of each row [rows], int64.
        weights: Weight of each row in the loss [rows], float32.
        tokens: For distillation, the teacher's row that belongs to each row [rows], int64.
    """

    targets: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


# ---------------------------------------------------------------------- logits, one chunk at a time


class _Decoder:
    """The decoder in blocks of classes, cast to the dtype of the computation one block at a time."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, exponentiate: Callable):
        self.weight, self.bias, self.dtype, self.exponentiate = weight, bias, dtype, exponentiate
        self.classes = weight.shape[0]
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        gpu = weight.device.type == "cuda"
        self.block_size, self.most_classes = _GPU_BLOCK, _GPU_COLUMN
        if not gpu:
            self.block_size, self.most_classes = _CPU_BLOCK // dtype.itemsize, _CPU_COLUMN
        # Memory that is used again and again stays in the cache.
        self._scratch = self._cast = self._product = torch.empty(0)
        rows = (_GPU_CHUNK if gpu else _CPU_CHUNK) // (max(self.classes, 1) * dtype.itemsize)
        self.rows_per_chunk = max(rows // _ALIGNMENT, 1) * _ALIGNMENT

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        """Return the bounds of the blocks of classes for a chunk of so many rows."""
        size = max(min(self.block_size // max(rows, 1), self.most_classes) // 32, 1) * 32
        return [(start, min(start + size, self.classes)) for start in range(0, self.classes, size)]

    def widened(self, logits: torch.Tensor) -> torch.Tensor:
        """Return low-precision logits in float32, in memory that is used again and again."""
        if logits.dtype not in (torch.bfloat16, torch.float16):
            return logits
        return self.float_scratch(logits.numel()).view(logits.shape).copy_(logits)

    def float_scratch(self, size: int) -> torch.Tensor:
        """Return memory for so many float32 numbers, valid until the next call."""
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.float32, device=self.weight.device)
        return self._scratch[:size]

    def block(self, start: int, end: int, width: int) -> torch.Tensor:
        """Return the first `width` columns of a block [classes, width], valid until the next block is asked for."""
        block = self.weight[start:end, :width]
        if block.dtype == self.dtype:
            return block
        if block.device.type == "cpu" and block.dtype == torch.float32 and width < self.weight.shape[1]:
            # A CPU casts whole rows faster than a third of each, and small parts faster once they are together.
            if width * 3 >= self.weight.shape[1]:
                block = self.weight[start:end]
            else:
                block = self.float_scratch(block.numel()).view(block.shape).copy_(block)
        if self._cast.numel() < block.numel():
            self._cast = torch.empty(block.numel(), dtype=self.dtype, device=block.device)
        return self._cast[: block.numel()].view(block.shape).copy_(block)[:, :width]

    def logits(self, x: torch.Tensor, start: int, end: int, out: torch.Tensor) -> torch.Tensor:
        """Return the logits of a block without its bias [classes, rows]: `out`, or memory of their own."""
        block = self.block(start, end, x.shape[1])
        plain = block.dtype != torch.float32 or block.device.type != "cpu" or not block.is_contiguous()
        if not plain and torch.backends.mkldnn.enabled and _onednn_product():
            # oneDNN does not copy the block, which is the larger factor, before it multiplies; MKL does.
            return torch.ops.mkldnn._linear_pointwise(block, x, None, "none", [], "")
        return torch.mm(block, x.T, out=out)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return `left @ right` in memory that is used again and again."""
        size = left.shape[0] * right.shape[1]
        if self._product.numel() < size:
            self._product = torch.empty(size, dtype=self.dtype, device=left.device)
        return torch.mm(left, right, out=self._product[:size].view(left.shape[0], right.shape[1]))

    def chunks(self, rows: int) -> list[slice]:
        """Return full chunks and what is left; equal parts where that would not be worth a pass over the decoder."""
        size = self.rows_per_chunk
        if 0 < rows % size < size // 4:
            units, passes = -(-rows // _ALIGNMENT), -(-rows // size)
            bounds = [min(units * index // passes * _ALIGNMENT, rows) for index in range(passes + 1)]
            return [slice(start, end) for start, end in pairwise(bounds)]
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def buffer(self, rows: Sequence[int]) -> torch.Tensor:
        """Return room for the exponentials of the largest chunk."""
        largest = max((part.stop - part.start for count in rows for part in self.chunks(count)), default=0)
        return self.weight.new_empty(_aligned(largest) * self.classes, dtype=self.dtype)


@functools.cache
def _onednn_product() -> bool:
    """Whether torch has the product of oneDNN that inductor calls, and it computes one here.

    Measured on an AMD processor; on other architectures than x86-64 it would run on other libraries.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    # No random numbers: a draw here would shift those of the run.
    left, right = (torch.arange(3.0 * n, dtype=torch.float32, device="cpu").view(n, 3) for n in (5, 4))
    try:
        product = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return torch.equal(product, left @ right.T)
    except (AttributeError, RuntimeError):
        return False


@dataclass
class _Scores:
    """A chunk of rows after its logits; normaliser (log of the sum), label's logit and whether none is larger [rows].

    The buffer holds `exp(logit - largest in the block)`; `factors[block]` [rows] turns these into probabilities.
    """

    normalizer: torch.Tensor
    target_logit: torch.Tensor
    hit: torch.Tensor
    factors: torch.Tensor


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pad(values: torch.Tensor) -> torch.Tensor:
    missing = _aligned(values.shape[0]) - values.shape[0]
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values


def _view(buffer: torch.Tensor, start: int, end: int, rows: int) -> torch.Tensor:
    return buffer[start * rows : end * rows].view(end - start, rows)


def _column_max(values: torch.Tensor) -> torch.Tensor:
    """Return the maximum of each column; in two steps, since torch reduces short rows six times slower on a CPU."""
    rows, columns = values.shape
    if rows % 32 or values.device.type != "cpu":
        return values.amax(dim=0)
    return values.view(rows // 32, 32 * columns).amax(dim=0).view(32, columns).amax(dim=0)


def exponentiate(
    wide: torch.Tensor, bias: torch.Tensor, target: torch.Tensor, product: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add the bias to a block of logits and replace them by `exp(logit - largest of the row)`, in place.

    Computed in base 2, whose exponential is twice as fast on a CPU.

    Args:
        wide: Product of a block of the decoder with the features [classes, rows], float32 or float64.
        bias: [classes].
        target: A class of each row, counted within the block [rows].
        product: Where the product is, if it is not in `wide`, which is then only written.

    Returns:
        Largest logit, sum of the exponentials, and logit of `target` [rows]; logits in base 2.
    """
    product = wide if product is None else product
    torch.add(bias.to(wide.dtype)[:, None] * _LOG2_E, product, alpha=_LOG2_E, out=wide)
    value = wide.gather(0, target[None])[0]
    largest = _column_max(wide)
    wide.sub_(largest).exp2_()
    return largest, wide.sum(dim=0), value


@functools.cache
def _compiled_exponentiate() -> Callable:
    return torch.compile(exponentiate, dynamic=True)


def _choose_exponentiate(backend: str, device: torch.device) -> Callable:
    if backend == "auto":
        backend = "inductor" if device.type == "cuda" and importlib.util.find_spec("triton") else "torch"
    return _compiled_exponentiate() if backend == "inductor" else exponentiate


def _score(decoder: _Decoder, x: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor | None) -> _Scores:
    """Compute the logits of a chunk of features [rows, width]; without a buffer, no exponentials are kept."""
    rows = x.shape[0]
    largest, sums, label = [], [], x.new_zeros(rows, dtype=decoder.exact)
    for start, end in decoder.blocks(rows):
        out = x.new_empty(end - start, rows) if buffer is None else _view(buffer, start, end, rows)
        product = decoder.logits(x, start, end, out)
        inside = (targets - start).clamp(0, end - start - 1)
        wide = decoder.widened(out)
        apart = {} if product is out else {"product": product}
        top, total, value = decoder.exponentiate(wide, decoder.bias[start:end], inside, **apart)
        if buffer is not None and wide is not out:
            out.copy_(wide)
        label = torch.where(targets - start == inside, value, label)
        largest.append(top)
        sums.append(total)
    tops = torch.stack(largest)
    best = tops.amax(dim=0)
    normalizer = best + (torch.stack(sums) * (tops - best).exp2()).sum(dim=0).log2()
    return _Scores(normalizer / _LOG2_E, label / _LOG2_E, label >= best, (tops - normalizer).exp2())


# ---------------------------------------------------------------------- loss and gradients of the chunks


class _Accumulator:
    """Loss and gradients of all rows, added up chunk by chunk.

    A row's loss is `lse + zeta lse^2 - h z_y - u mean(z) - q E_q[z - log q]`, with shares h + u + q = 1 of its label
    y, of the uniform distribution and of the teacher's distribution q. Its gradient by the logits is therefore
    `(1 + 2 zeta lse) p - h 1_y - u / classes - q`: the first and the last term are products with exponentials that
    the buffer holds when the row, and when its teacher, is scored; the others are sparse, or equal for all classes.
    """

    def __init__(self, decoder: _Decoder, features, rows: Sequence[ScoredRows], options: MLMLossOptions, needs):
        self.decoder, self.rows, self.options = decoder, rows, options
        self.features = [x.to(decoder.dtype) for x in features]
        self.weights = [group.weights.to(decoder.exact) for group in rows]
        weight, bias, exact = decoder.weight, decoder.bias, decoder.exact
        self.differentiate = any(needs)
        # Chunk after chunk is added to the decoder's gradient: in low precision, sums would lose what each adds.
        low = weight.dtype in (torch.bfloat16, torch.float16)
        self.grad_weight = torch.empty_like(weight, dtype=exact if low else None) if needs[0] else None
        self.written = 0
        self.grad_bias = torch.zeros_like(bias, dtype=exact) if needs[1] else None
        self.grads = [torch.zeros_like(x, dtype=exact) for x in self.features]
        self.loss = torch.zeros((), dtype=exact, device=weight.device)
        self.nlls = [torch.zeros_like(w) for w in self.weights]
        self.hits = [torch.zeros_like(w, dtype=torch.bool) for w in self.weights]
        self.buffer = torch.empty(0)
        if self.differentiate or options.distillation_weight:
            self.buffer = decoder.buffer([x.shape[0] for x in self.features])
        if options.label_smoothing:
            self.mean_weight, self.mean_bias = weight.mean(0, dtype=exact), bias.mean(dtype=exact)
        if options.distillation_weight:
            self._ask_teacher()

    def _ask_teacher(self) -> None:
        """Sum over each token's students their weighted features [tokens, width] and weights [tokens].

        The decoder's gradient holds - q x for each student x: summed over students before the product with the
        teacher's q, it is a part of the teacher's own product and costs nothing.
        """
        share = self.options.distillation_weight
        self.asked_weight = torch.zeros_like(self.features[0], dtype=self.decoder.exact)
        self.asked_bias = torch.zeros_like(self.weights[0])
        for x, w, group in zip(self.features[1:], self.weights[1:], self.rows[1:], strict=True):
            self.asked_weight[:, : x.shape[1]].index_add_(0, group.tokens, x.to(w.dtype) * (share * w)[:, None])
            self.asked_bias.index_add_(0, group.tokens, share * w)
        # The teacher's expectations of the decoder's weight and bias, and of the logarithm of its own probability.
        self.taught_weight = torch.zeros_like(self.asked_weight)
        self.taught_bias, self.negative_entropy = torch.zeros_like(self.asked_bias), torch.zeros_like(self.asked_bias)

    def run(self) -> None:
        """Score and differentiate everything, the teacher first."""
        order = [index for index, x in enumerate(self.features) if x.shape[0]]
        if not self.options.distillation_weight:
            order.sort(key=lambda index: -self.features[index].shape[1])
        if self.grad_weight is not None:
            # What the first product will not write.
            self.grad_weight[:, self.features[order[0]].shape[1] if order else 0 :] = 0
        for index in order:
            for part in self.decoder.chunks(self.features[index].shape[0]):
                self._add(index, part)

    def _shares(self, index: int) -> tuple[float, float, float]:
        """Return the shares of label, uniform distribution and teacher in the targets of a group."""
        soft = self.options.distillation_weight if index else 0.0
        uniform = (1.0 - soft) * self.options.label_smoothing
        return 1.0 - soft - uniform, uniform, soft

    def _add(self, index: int, part: slice) -> None:
        group, w = self.rows[index], self.weights[index][part]
        x, y = self.features[index][part], group.targets[part]
        size, width = x.shape
        teaches = bool(self.options.distillation_weight) and index == 0
        hard, uniform, soft = self._shares(index)
        scores = _score(self.decoder, _pad(x), _pad(y), self.buffer if self.buffer.numel() else None)
        low_x, x = x, x.to(w.dtype)
        lse, label = scores.normalizer[:size], scores.target_logit[:size]
        self.nlls[index][part], self.hits[index][part] = lse - label, scores.hit[:size]
        value = lse + self.options.z_loss_weight * lse.square() - hard * label
        if uniform:
            value = value - uniform * (x @ self.mean_weight[:width] + self.mean_bias)
        if soft:
            tokens = group.tokens[part]
            taught = self.taught_weight[tokens, :width]
            value = value + soft * (self.negative_entropy[tokens] - (x * taught).sum(1) - self.taught_bias[tokens])
        self.loss += (value * w).sum()
        if not self.differentiate and not teaches:
            return
        # By the logits, the gradient is `scale` times the probabilities, less the targets.
        scale = w * (1.0 + 2.0 * self.options.z_loss_weight * lse)
        right, right_bias = x * scale[:, None], scale
        if teaches:
            right, right_bias = right - self.asked_weight[part], right_bias - self.asked_bias[part]
        mean_weight, mean_bias = self._multiply(scores, low_x, right, right_bias, teaches)
        if teaches:
            self.taught_weight[part], self.taught_bias[part] = mean_weight, mean_bias
            self.negative_entropy[part] = (x * mean_weight).sum(1) + mean_bias - lse
        if not self.differentiate:
            return
        grad = mean_weight * scale[:, None]
        grad -= (w * hard)[:, None] * self.decoder.weight[y, :width].to(w.dtype)
        if uniform:
            grad -= (w * uniform)[:, None] * self.mean_weight[:width]
        if soft:
            grad -= (w * soft)[:, None] * taught
        self.grads[index][part] = grad
        spread = w * uniform / self.decoder.classes
        if self.grad_weight is not None:
            out = self.grad_weight[:, :width]
            out.index_add_(0, y, (x * (-w * hard)[:, None]).to(out.dtype))
            if uniform:
                out -= (spread @ x).to(out.dtype)
        if self.grad_bias is not None:
            self.grad_bias.index_add_(0, y, -w * hard)
            self.grad_bias -= spread.sum()

    def _multiply(self, scores: _Scores, x, right, right_bias, teaches) -> tuple[torch.Tensor, torch.Tensor]:
        """Multiply the chunk's probabilities [classes, rows] with the decoder, and with `right` into its gradient.

        Returns:
            Expected weight [rows, width] and, for a teacher, bias [rows] of the decoder.
        """
        decoder, dtype, (size, width) = self.decoder, self.decoder.dtype, x.shape
        # float16 would lose the small weight that one token has in a large batch: it is put back afterwards.
        units = [1.0, 1.0]
        if dtype == torch.float16:
            units = [values.abs().amax().clamp_min(1e-30) for values in (right, right_bias)]
        right, right_bias = _pad(right / units[0]), _pad(right_bias / units[1])
        mean_weight, mean_bias = torch.zeros_like(right), torch.zeros_like(right_bias)
        for (start, end), factor in zip(decoder.blocks(right.shape[0]), scores.factors, strict=True):
            exponentials = _view(self.buffer, start, end, right.shape[0])
            mean_weight += _transposed_product(exponentials, decoder.block(start, end, width)) * factor[:, None]
            if teaches:
                mean_bias += (decoder.bias[start:end].to(dtype) @ exponentials) * factor
            if self.grad_weight is not None:
                out = self.grad_weight[start:end, :width]
                self._add_product(out, exponentials, (right * factor[:, None]).to(dtype), units[0])
            if self.grad_bias is not None:
                product = exponentials @ (right_bias * factor).to(dtype)
                self.grad_bias[start:end] += product.to(self.grad_bias.dtype) * units[1]
        self.written = max(self.written, width)
        return mean_weight[:size], mean_bias[:size]

    def _add_product(self, out, exponentials, right, unit) -> None:
        """Add to a block of the decoder's gradient; its first product is written there, without zeros before it."""
        if out.dtype == right.dtype:
            if self.written:
                out.addmm_(exponentials, right)
            else:
                torch.mm(exponentials, right, out=out)
            return
        product = self.decoder.product(exponentials, right)
        if right.dtype == torch.float16:
            product = product.to(out.dtype) * unit
        if self.written:
            out.add_(product)
        else:
            out.copy_(product)


def _transposed_product(exponentials: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Return `exponentials.T @ block` [rows, width], in the orientation that MKL is faster at."""
    if exponentials.dtype == torch.float32 and exponentials.device.type == "cpu":
        return (block.T @ exponentials).T
    return exponentials.T @ block


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of [`linear_cross_entropy`], differentiated on the way forward."""

    @staticmethod
    def forward(ctx, weight, bias, rows, options, dtype, differentiate, *features):
        needs = [differentiate and flag for flag in ctx.needs_input_grad]
        decoder = _Decoder(weight, bias, dtype, _choose_exponentiate(options.backend, weight.device))
        total = _Accumulator(decoder, features, rows, options, needs)
        total.run()
        ctx.grads = (total.grad_weight, total.grad_bias, *total.grads) if total.differentiate else None
        ctx.dtypes = (weight.dtype, bias.dtype, *(x.dtype for x in features))
        ctx.mark_non_differentiable(*total.nlls, *total.hits)
        return total.loss, *total.nlls, *total.hits

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if ctx.grads is None:
            raise RuntimeError(
                "This loss computes its gradients in the forward pass and hands them out once: run the model again "
                "instead of going backward a second time with `retain_graph=True`."
            )
        grads, ctx.grads = ctx.grads, None
        # Nearly every training loop passes exactly 1, and the decoder's gradient is the largest tensor of a step; to
        # look at the value is free on a CPU only.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)
        weight, bias, *features = (
            None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return weight, bias, None, None, None, None, *features


@torch.compiler.disable
def linear_cross_entropy(
    features: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    rows: Sequence[ScoredRows],
    options: MLMLossOptions | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Return the weighted cross entropy of rows of several widths without ever holding their logits.

    It can be differentiated once: the gradients are computed in the forward pass (see the module's description).

    Args:
        features: One tensor [rows, width] for each group, what the decoder reads.
        weight: Decoder [classes, widest]; a group uses its first `width` columns.
        bias: Decoder bias [classes].
        rows: Targets and weights of each group. For distillation, the first group is the teacher of the others.
        options: `distillation_weight`, `label_smoothing`, `z_loss_weight` and `backend` act here.

    Returns:
        The weighted sum over all rows (a scalar, float32 or float64, differentiable in features, weight and bias);
        for each group, detached, the cross entropy of each row [rows] and whether no logit exceeds its label's.
    """
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        loss, *parts = _LinearCrossEntropy.apply(
            weight, bias, rows, options or MLMLossOptions(), dtype, torch.is_grad_enabled(), *features
        )
    return loss, parts[: len(features)], parts[len(features) :]


# ---------------------------------------------------------------------- the multigranular objective


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


def draw_granularities(tokens: int, granularities: int, drawn: int) -> list[torch.Tensor]:
    """Assign `drawn` different granularities to each token, every granularity being equally likely for every token.

    The assignment is balanced, which plain independent draws are not: no granularity gets more than one token more
    than another, so the estimate of each granularity's loss varies less.

    Args:
        tokens: Number of tokens.
        granularities: Number of granularities.
        drawn: Granularities of each token.

    Returns:
        For each granularity, the tokens that it scores, int64 on the CPU; drawn from torch's global generator, whose
        state a checkpoint of the Trainer holds.
    """
    order, cycle = torch.randperm(tokens), torch.randperm(granularities)
    slots = torch.arange(tokens * drawn)
    owner, token = cycle[slots % granularities], order[slots // drawn]
    return [token[owner == granularity] for granularity in range(granularities)]


def multigranular_mlm_loss(
    exit_hidden_states: Sequence[torch.Tensor],
    labels: torch.Tensor,
    head: nn.Module,
    decoder: nn.Linear,
    exit_layers: Sequence[int],
    dimensions: Sequence[int],
    num_items_in_batch: torch.Tensor | int | None = None,
    options: MLMLossOptions | None = None,
    training: bool = True,
) -> MLMLossOutput:
    """Masked-language-model loss of every (exit, dimension): their weighted sum, as in the released pretraining.

    Granularity (l, d) contributes the cross entropy, averaged over labelled tokens, of
    `decoder(head(exit_hidden_states[l][..., :d]))` (arXiv 2605.19568).

    Args:
        exit_hidden_states: One state [batch, tokens, width] per exit, shallow first; those above the deepest exit that
            is scored may be missing.
        labels: Labels [batch, tokens], int64, -100 for tokens that are not predicted.
        head: Maps [labelled tokens, d] to [labelled tokens, d] for every d of `dimensions`.
        decoder: Linear layer [classes, width] with bias, sliced to its first d columns.
        exit_layers: The layer of each state.
        dimensions: Output widths d.
        num_items_in_batch: Number of labelled tokens to average over, when this call is one part of a larger batch
            (gradient accumulation, data parallelism). `None` averages over this call's own labelled tokens.
        options: What to sum; see [`MLMLossOptions`].
        training: Whether the options that act in training only are used.

    Raises:
        ValueError: If a label is outside the vocabulary, or the options do not fit the model.
    """
    options = options or MLMLossOptions()
    if not training:
        options = replace(
            options, stochastic_granularities=None, distillation_weight=0.0, label_smoothing=0.0, z_loss_weight=0.0
        )
    pairs = options.resolve(exit_layers, dimensions)
    positions, targets = select_labelled(labels, decoder.weight.shape[0])
    tokens, device = targets.numel(), targets.device
    states = [state.reshape(-1, state.shape[-1])[positions] for state in exit_hidden_states]
    count = max(tokens, 1) if num_items_in_batch is None else num_items_in_batch
    # The largest granularity learns from labels alone, and teaches the others; only it must see every token.
    teacher = pairs.index(max(pairs)) if options.distillation_weight and len(pairs) > 1 else None
    if teacher is None and options.distillation_weight:
        options = replace(options, distillation_weight=0.0)
    every = torch.arange(tokens, device=device)
    chosen, importance = [every] * len(pairs), [1.0] * len(pairs)
    drawn = options.stochastic_granularities
    others = [index for index in range(len(pairs)) if index != teacher]
    if drawn is not None and drawn < len(others):
        for index, part in zip(others, draw_granularities(tokens, len(others), drawn), strict=True):
            chosen[index], importance[index] = part.to(device), len(others) / drawn

    factors = options.granularity_weights or [1.0] * len(pairs)
    features, rows, owners = [], [], []
    widths = sorted({pairs[index][1] for index in others}, reverse=True)
    groups = [[index for index in others if pairs[index][1] == width] for width in widths]
    for group in ([[teacher]] if teacher is not None else []) + groups:
        width = pairs[group[0]][1]
        # One product for all exits: the more rows share the decoder, the faster it is multiplied.
        stacked = torch.cat(
            [states[list(exit_layers).index(pairs[index][0])][chosen[index], :width] for index in group]
        )
        token = torch.cat([chosen[index] for index in group])
        sizes = torch.tensor([chosen[index].numel() for index in group], device=device)
        owner = torch.tensor(group, device=device).repeat_interleave(sizes)
        factor = torch.tensor([factors[index] * importance[index] for index in group], dtype=torch.float32)
        weights = factor.to(device).repeat_interleave(sizes)
        features.append(head(stacked))
        rows.append(ScoredRows(targets[token], weights / count if options.reduction == "mean" else weights, token))
        owners.append(owner)
    loss, nlls, hits = linear_cross_entropy(features, decoder.weight, decoder.bias, rows, options)

    shares = torch.tensor(importance, dtype=torch.float32, device=device)
    losses, accuracies = torch.zeros_like(shares), torch.zeros_like(shares)
    for owner, nll, hit in zip(owners, nlls, hits, strict=True):
        losses.index_add_(0, owner, nll.float() * shares[owner])
        accuracies.index_add_(0, owner, hit.float() * shares[owner])
    places = [list(exit_layers).index(layer) * len(dimensions) + list(dimensions).index(d) for layer, d in pairs]
    grid = losses.new_full((2, len(exit_layers) * len(dimensions)), math.nan)
    grid[0, places] = losses / count if options.reduction == "mean" else losses
    grid[1, places] = accuracies / count
    grid = grid.view(2, len(exit_layers), len(dimensions))
    return MLMLossOutput(loss, grid[0], grid[1])


__all__ = [
    "MLMLossOptions",
    "MLMLossOutput",
    "ScoredRows",
    "draw_granularities",
    "linear_cross_entropy",
    "multigranular_mlm_loss",
    "select_labelled",
]
