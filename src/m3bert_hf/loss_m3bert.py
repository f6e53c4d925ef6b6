"""The multigranular masked-language-model loss: one cross entropy for every (exit layer, first d dimensions).

The decoder is by far the largest matrix product of the model (250,002 classes in the base size), so four things keep
it small. Only labelled tokens are scored. The decoder is read in blocks of classes, twice, once for the normalisers of
all granularities and once for their gradients: each block is cast, and its gradient written, once for all of them.
Gradients are computed on the way forward. And the exponentials of the first pass wait for the second in the memory of
the decoder's gradient, which is written from its start while they are read towards its end: logits need memory for one
block alone. What has no room there (a gradient of 768 columns in float32 holds the exponentials of 1,344 rows in
bfloat16) is computed a second time. Measured at base size on a CPU, this beats other orders (docs/pretraining.md).
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

# Rows that are multiplied together, and bytes of all memory beside the decoder's gradient: blocks have as many
# classes, in these steps, as fit into it, however few the rows are. On a CPU, larger blocks leave the cache.
_CPU_ROWS, _GPU_ROWS = 256, 1024
_CPU_WORKSPACE, _GPU_WORKSPACE = 2**26, 2**28
_STEP = 2**11
# Share of the decoder's gradient that exponentials may fill: the fuller, the smaller are the blocks near its end, lest
# they be written over what is kept of them. Blocks of less than four times so many classes are copied instead.
_ROOM, _COPIED = 7 / 8, 2**10
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
        teacher, widest = max(pairs), max(dimension for _, dimension in pairs)
        if self.distillation_weight and teacher[1] < widest:
            raise ValueError(
                f"The teacher of `distillation_weight` is the deepest granularity, {teacher}, and must be as wide as "
                f"any: add ({teacher[0]}, {widest}) to `granularities`."
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


# ---------------------------------------------------------------------- logits, one block of classes at a time


class _Decoder:
    """The decoder's first columns in blocks of classes, cast to the dtype of the computation.

    What its methods return is valid until another is called, but for blocks and exponentials, which are so until the
    same one is: memory that is used again and again stays in the cache.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, exponentiate: Callable):
        self.weight, self.bias, self.dtype, self.exponentiate = weight, bias, dtype, exponentiate
        self.classes = weight.shape[0]
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        gpu = weight.device.type == "cuda"
        self.rows_at_once, self.workspace = (_GPU_ROWS, _GPU_WORKSPACE) if gpu else (_CPU_ROWS, _CPU_WORKSPACE)
        self.memory: dict[str, torch.Tensor] = {}

    def block(self, start: int, end: int, widths: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return the first columns of a block of classes [classes, width], for each of these widths."""
        block, widest = self.weight[start:end, : max(widths, default=0)], max(widths, default=0)
        if block.dtype == self.dtype:
            return {width: block[:, :width] for width in widths}
        if block.device.type == "cpu" and block.dtype == torch.float32 and widest < self.weight.shape[1]:
            # A CPU casts whole rows faster than a third of each, and small parts faster once they are together.
            if widest * 3 >= self.weight.shape[1]:
                block = self.weight[start:end]
            else:
                block = self._floats(block.numel()).view(block.shape).copy_(block)
        cast = self._memory("cast", block.numel(), self.dtype).view(block.shape).copy_(block)
        # A product would copy what is not contiguous, and a transposed one slowly.
        return {width: cast if width == cast.shape[1] else self._narrow(cast, width) for width in widths}

    def _narrow(self, block: torch.Tensor, width: int) -> torch.Tensor:
        shape = block.shape[0], width
        return self._memory(str(width), math.prod(shape), self.dtype).view(shape).copy_(block[:, :width])

    def logits(self, block: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits of a block without its bias [classes, rows], float32 or float64; perhaps in `out`."""
        plain = block.dtype != torch.float32 or block.device.type != "cpu" or not block.is_contiguous()
        if not plain and torch.backends.mkldnn.enabled and _onednn_product():
            # oneDNN does not copy the block, which is the larger factor, before it multiplies; MKL does.
            return torch.ops.mkldnn._linear_pointwise(block, x, None, "none", [], "")
        if out is not None and out.dtype == self.exact and out.shape[1] == x.shape[0]:
            return torch.mm(block, x.T, out=out)
        product = self.product(block, x.T)
        if product.dtype == self.exact:
            return product
        return self._floats(product.numel()).view(product.shape).copy_(product)

    def exponentials(
        self, block: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, largest: torch.Tensor
    ) -> torch.Tensor:
        """Return `exp(logit - largest)` of a block of classes [classes, rows].

        Args:
            block: [classes, width].
            bias: [classes].
            x: Features [rows, width].
            largest: Largest logit of each row within the block [rows], in base 2.
        """
        logits = self.logits(block, x)
        torch.add(bias.to(logits.dtype)[:, None] * _LOG2_E, logits, alpha=_LOG2_E, out=logits)
        logits.sub_(largest).exp2_()
        if logits.dtype == self.dtype:
            return logits
        return self._memory("exponentials", logits.numel(), self.dtype).view(logits.shape).copy_(logits)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return `left @ right`."""
        shape = left.shape[0], right.shape[1]
        return torch.mm(left, right, out=self._memory("product", math.prod(shape), self.dtype).view(shape))

    def add(self, out: torch.Tensor, product: torch.Tensor, unit: float, written: bool) -> None:
        """Add a multiple of `product` to `out`, of a higher precision, or write it there."""
        if not written:
            out.copy_(product)
            if unit != 1.0:
                out.mul_(unit)
            return
        # A sum of two dtypes would cast all of the product at once, into memory of its own.
        size = max(self.memory["floats"].numel() // product.shape[1], 1)
        for here, part in zip(out.split(size), product.split(size), strict=True):
            here.add_(self._floats(part.numel()).view(part.shape).copy_(part), alpha=unit)

    def _floats(self, size: int) -> torch.Tensor:
        return self._memory("floats", size, torch.float32)

    def _memory(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = torch.empty(size, dtype=dtype, device=self.weight.device)
        return self.memory[name][:size]


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


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pad(values: torch.Tensor) -> torch.Tensor:
    missing = _aligned(values.shape[0]) - values.shape[0]
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values


def _parts(rows: int, size: int) -> list[slice]:
    """Return slices of about equal size, as few as there can be."""
    units, count = -(-rows // _ALIGNMENT), max(-(-rows // size), 1)
    bounds = [min(units * index // count * _ALIGNMENT, rows) for index in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(bounds) if start < end]


def _column_max(values: torch.Tensor) -> torch.Tensor:
    """Return the maximum of each column; in two steps, since torch reduces short rows six times slower on a CPU."""
    rows, columns = values.shape
    if rows % 32 or values.device.type != "cpu":
        return values.amax(dim=0)
    return values.view(rows // 32, 32 * columns).amax(dim=0).view(32, columns).amax(dim=0)


def exponentiate(
    logits: torch.Tensor, bias: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add the bias to a block of logits and replace them by `exp(logit - largest of the row)`, in place.

    Computed in base 2, whose exponential is twice as fast on a CPU.

    Args:
        logits: Product of a block of the decoder with the features [classes, rows], float32 or float64.
        bias: [classes].
        target: A class of each row, counted within the block [rows].

    Returns:
        Largest logit, sum of the exponentials, and logit of `target` [rows]; logits in base 2.
    """
    torch.add(bias.to(logits.dtype)[:, None] * _LOG2_E, logits, alpha=_LOG2_E, out=logits)
    value = logits.gather(0, target[None])[0]
    largest = _column_max(logits)
    logits.sub_(largest).exp2_()
    return largest, logits.sum(dim=0), value


@functools.cache
def _compiled_exponentiate() -> Callable:
    return torch.compile(exponentiate, dynamic=True)


def _choose_exponentiate(backend: str, device: torch.device) -> Callable:
    if backend == "auto":
        backend = "inductor" if device.type == "cuda" and importlib.util.find_spec("triton") else "torch"
    return _compiled_exponentiate() if backend == "inductor" else exponentiate


# ---------------------------------------------------------------------- loss and gradients of all rows


@dataclass
class _Part:
    """Rows of one group that are multiplied together, and what is known of them; padded to a multiple of 16 rows.

    Attributes:
        group: Index of the group.
        rows: Which of its rows.
        x: Features [rows, width].
        targets: Classes [rows].
        kept: Of how many rows the exponentials are kept.
        offset: For each class, the numbers that are kept before these.
        tops: For each block of classes, the largest logit [rows].
        sums: For each block, the sum of `exp(logit - largest)` [rows].
        label: Logit of the target [rows].
        normalizer: Logarithm of the sum over all classes [rows]. All logits are in base 2.
        right: What the probabilities are multiplied with for the decoder's gradient [rows, width] once each row is
            scaled by `scale` [rows]; `right_bias` [rows] for its bias.
        units: What products with `right` and with `right_bias` have to be multiplied with after them.
    """

    group: int
    rows: slice
    x: torch.Tensor
    targets: torch.Tensor
    label: torch.Tensor
    kept: int = 0
    offset: int = 0
    tops: list[torch.Tensor] = field(default_factory=list)
    sums: list[torch.Tensor] = field(default_factory=list)
    normalizer: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    right: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    scale: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    right_bias: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    units: tuple[float, ...] = (1.0, 1.0)

    @property
    def size(self) -> int:
        """Rows without those that pad."""
        return self.rows.stop - self.rows.start


class _Accumulator:
    """Loss and gradients of all rows.

    A row's loss is `lse + zeta lse^2 - h z_y - u mean(z) - q E_q[z - log q]`, with shares h + u + q = 1 of its label
    y, of the uniform distribution and of the teacher's distribution q. Its gradient by the logits is therefore
    `(1 + 2 zeta lse) p - h 1_y - u / classes - q`: the first and the last term are products with probabilities that
    the row, and its teacher, have at hand; the others are sparse, or equal for all classes.
    """

    def __init__(self, decoder: _Decoder, features, rows: Sequence[ScoredRows], options: MLMLossOptions, needs):
        self.decoder, self.rows, self.options = decoder, rows, options
        self.features = [x.to(decoder.dtype) for x in features]
        self.weights = [group.weights.to(decoder.exact) for group in rows]
        weight, bias, exact = decoder.weight, decoder.bias, decoder.exact
        self.differentiate = any(needs)
        # Products of many parts are added up: in low precision, sums would lose what each adds.
        low = weight.dtype in (torch.bfloat16, torch.float16)
        self.grad_weight = None
        if needs[0]:
            self.grad_weight = torch.empty(weight.shape, dtype=exact if low else weight.dtype, device=weight.device)
        self.grad_bias = torch.zeros_like(bias, dtype=exact) if needs[1] else None
        self.grads = [torch.zeros_like(x, dtype=exact) for x in self.features]
        self.loss = torch.zeros((), dtype=exact, device=weight.device)
        self.nlls = [torch.zeros_like(w) for w in self.weights]
        self.hits = [torch.zeros_like(w, dtype=torch.bool) for w in self.weights]
        if options.label_smoothing:
            self.mean_weight, self.mean_bias = weight.mean(0, dtype=exact), bias.mean(dtype=exact)
            # What every row of the decoder's gradient loses.
            self.spread = torch.zeros_like(self.mean_weight)
        if options.distillation_weight:
            self._ask_teacher()
        self.parts = self._divide()
        self.widths = sorted({part.x.shape[1] for part in self.parts}, reverse=True)
        self.kept = self._find_room()

    def _divide(self) -> list[_Part]:
        """Return all rows in parts: the teacher's first, then the widest, whose products cost most.

        The first part is the widest in any case: what it writes to the decoder's gradient, others add to.
        """
        order = range(len(self.features))
        parts = []
        for index in sorted(order, key=lambda i: (not self._teaches(i), -self.features[i].shape[1])):
            for rows in _parts(self.features[index].shape[0], self.decoder.rows_at_once):
                x, y = _pad(self.features[index][rows]), _pad(self.rows[index].targets[rows])
                parts.append(_Part(index, rows, x, y, x.new_zeros(x.shape[0], dtype=self.decoder.exact)))
        return parts

    def _find_room(self) -> torch.Tensor:
        """Choose the rows whose exponentials are kept, and return their memory: the end of the decoder's gradient."""
        self.kept_each = 0
        if self.grad_weight is None:
            return torch.empty(0)
        numbers = self.grad_weight.view(-1).view(self.decoder.dtype)
        room, taken = int(numbers.numel() / max(self.decoder.classes, 1) * _ROOM) // _ALIGNMENT * _ALIGNMENT, 0
        for part in self.parts:
            part.kept, part.offset = min(part.x.shape[0], room - taken), taken
            if part.kept < part.x.shape[0] and self.decoder.dtype != self.decoder.exact:
                # Products of further sizes, for which oneDNN generates code, would cost more than is saved.
                part.kept = 0
            taken += part.kept
        self.kept_each = taken
        return numbers[numbers.numel() - taken * self.decoder.classes :]

    def _teaches(self, index: int) -> bool:
        return bool(self.options.distillation_weight) and index == 0

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

    def _blocks(self) -> list[tuple[int, int]]:
        """Return the bounds of the blocks of classes: as many classes as the workspace has memory for."""
        rows = max((part.x.shape[0] for part in self.parts), default=0)
        again = any(part.kept < part.x.shape[0] for part in self.parts)
        size, exact = self.decoder.dtype.itemsize, self.decoder.exact.itemsize
        numbers = sum((part.size + part.x.shape[0]) * part.x.shape[1] for part in self.parts)
        taken = numbers * (size + exact) // 2 + self.kept_each * size * 4 * _COPIED
        if size == exact:
            each = (1 + (again or len(self.widths) > 1)) * rows * size
        else:
            product = max(max(self.widths, default=0) + _ALIGNMENT, rows)
            cast = sum(self.widths) + self.decoder.weight.shape[1] - max(self.widths, default=0)
            each = (cast + product + again * rows) * size + rows * exact
        most = max(self.decoder.workspace - taken, self.decoder.workspace // 4) // max(each, 1)
        if self.decoder.dtype == torch.float16:
            # A sum of so many numbers of at most 1 stays below the largest that float16 holds.
            most = min(most, 2**15)
        count, bounds = max(most // _STEP, 1) * _STEP, [0]
        filled = self.kept.nbytes / max(self.grad_weight.nbytes, 1) if self.grad_weight is not None else 0.0
        while bounds[-1] < self.decoder.classes:
            # What is written up to the end of a block must not reach what is kept of its first class. Few sizes, since
            # oneDNN generates code for each.
            room = (1.0 - filled) * (self.decoder.classes - bounds[-1]) if filled else math.inf
            while count % 4 == 0 and count >= 4 * _COPIED and count > room:
                count //= 4
            bounds.append(min(bounds[-1] + count, self.decoder.classes))
        return list(pairwise(bounds))

    def run(self) -> None:
        """Score and differentiate everything."""
        blocks = self._blocks()
        for start, end in blocks:
            self._score(start, end)
        for part in self.parts:
            self._normalize(part)
        if self.differentiate or self.options.distillation_weight:
            for index, (start, end) in enumerate(blocks):
                self._multiply(index, start, end)
        for part in self.parts:
            self._finish(part)
        if self.options.label_smoothing and self.grad_weight is not None:
            self.grad_weight -= self.spread.to(self.grad_weight.dtype)

    def _held(self, part: _Part, memory: torch.Tensor, classes: int) -> torch.Tensor | None:
        """Return the part's exponentials [classes, kept rows] within the memory of a block."""
        if not part.kept:
            return None
        return memory[part.offset * classes : (part.offset + part.kept) * classes].view(classes, part.kept)

    def _block(self, start: int, end: int) -> tuple[dict[int, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return a block of the decoder for each width, what is kept of it, and its bias."""
        kept = self.kept[start * self.kept_each : end * self.kept_each]
        return self.decoder.block(start, end, self.widths), kept, self.decoder.bias[start:end]

    def _score(self, start: int, end: int) -> None:
        """Compute the logits of a block of classes, and keep their exponentials."""
        block, memory, bias = self._block(start, end)
        for part in self.parts:
            self._exponentiate(part, block[part.x.shape[1]], bias, start, self._held(part, memory, end - start))

    def _exponentiate(self, part: _Part, block, bias, start: int, held: torch.Tensor | None) -> None:
        """Compute a part's logits of a block of classes."""
        logits = self.decoder.logits(block, part.x, held)
        inside = (part.targets - start).clamp(0, block.shape[0] - 1)
        top, total, value = self.decoder.exponentiate(logits, bias, inside)
        if held is not None and held.data_ptr() != logits.data_ptr():
            held.copy_(logits[:, : part.kept])
        part.label = torch.where(part.targets - start == inside, value, part.label)
        part.tops.append(top)
        part.sums.append(total)

    def _shares(self, index: int) -> tuple[float, float, float]:
        """Return the shares of label, uniform distribution and teacher in the targets of a group."""
        soft = self.options.distillation_weight if index else 0.0
        uniform = (1.0 - soft) * self.options.label_smoothing
        return 1.0 - soft - uniform, uniform, soft

    def _normalize(self, part: _Part) -> None:
        """Find the normalisers of a part's rows, and what its probabilities are to be multiplied with."""
        tops, index = torch.stack(part.tops), part.group
        best = tops.amax(dim=0)
        part.normalizer = best + (torch.stack(part.sums) * (tops - best).exp2()).sum(dim=0).log2()
        lse = part.normalizer / _LOG2_E
        self.nlls[index][part.rows] = (lse - part.label / _LOG2_E)[: part.size]
        self.hits[index][part.rows] = (part.label >= best)[: part.size]
        # By the logits, the gradient is `scale` times the probabilities, less the targets.
        part.scale = _pad(self.weights[index][part.rows]) * (1.0 + 2.0 * self.options.z_loss_weight * lse)
        part.right, part.right_bias = part.x, part.scale
        if self._teaches(index):
            part.right = part.x * part.scale[:, None] - _pad(self.asked_weight[part.rows])
            part.right_bias = part.scale - _pad(self.asked_bias[part.rows])
            part.scale = torch.ones_like(part.scale)
        # float16 would lose the small weight that one token has in a large batch: it is put back afterwards.
        if self.decoder.dtype == torch.float16:
            right = part.right * part.scale[:, None]
            largest = torch.stack([right.abs().amax(), part.right_bias.abs().amax()])
            part.units = tuple(largest.clamp_min(1e-30).tolist())
        part.scale, part.right_bias = part.scale / part.units[0], part.right_bias / part.units[1]

    def _multiply(self, index: int, start: int, end: int) -> None:
        """Multiply the probabilities of a block of classes with the decoder, and into its gradient."""
        block, memory, bias = self._block(start, end)
        out = grad_bias = None
        if self.grad_bias is not None:
            grad_bias = self.grad_bias[start:end]
        if self.grad_weight is not None:
            out = self.grad_weight[start:end]
            if memory.numel() and out.data_ptr() + out.nbytes > memory.data_ptr():
                # What is kept of this block is about to be written over.
                memory = memory.clone()
        written = 0
        for part in self.parts:
            if not self.differentiate and not self._teaches(part.group):
                continue
            width, held = part.x.shape[1], self._held(part, memory, end - start)
            for rows in (slice(0, part.kept), slice(part.kept, part.x.shape[0])):
                if rows.start == rows.stop:
                    continue
                top = part.tops[index][rows]
                if held is not None and rows.start == 0:
                    values = held
                else:
                    values = self.decoder.exponentials(block[width], bias, part.x[rows], top)
                # Makes probabilities of them, which float16 could not hold.
                factor = (top - part.normalizer[rows]).exp2()
                real = slice(part.rows.start + rows.start, min(part.rows.start + rows.stop, part.rows.stop))
                count = real.stop - real.start
                mean = _transposed_product(values, block[width]) * factor[:, None]
                self.grads[part.group][real] += mean[:count]
                if self._teaches(part.group):
                    self.taught_bias[real] += ((bias.to(values.dtype) @ values) * factor)[:count]
                right = part.right[rows] * (part.scale[rows] * factor)[:, None]
                right_bias = part.right_bias[rows] * factor
                self._add_products(out, grad_bias, values, right, right_bias, part.units, bool(written))
                written = max(written, width)
        if out is not None:
            out[:, written:] = 0

    def _add_products(self, out, grad_bias, values, right, right_bias, units, written: bool) -> None:
        """Add to a block of the decoder's gradients; the first product is written there, without zeros before it."""
        width, dtype = right.shape[1], values.dtype
        if dtype == self.decoder.exact:
            if grad_bias is not None:
                grad_bias += values @ right_bias
            if out is None:
                return
            if written:
                out[:, :width].addmm_(values, right)
            else:
                torch.mm(values, right, out=out[:, :width])
            return
        if out is None and grad_bias is None:
            return
        # The bias is one more column, or in low precision 16, since less is lost by rounding from a part of the sum.
        columns = torch.diag_embed(right_bias.view(-1, _ALIGNMENT)).view(-1, _ALIGNMENT)
        rights = ([] if out is None else [right]) + ([] if grad_bias is None else [columns])
        product = self.decoder.product(values, torch.cat(rights, dim=1).to(dtype))
        if grad_bias is not None:
            grad_bias.add_(product[:, -_ALIGNMENT:].sum(1, dtype=grad_bias.dtype), alpha=units[1])
        if out is not None:
            self.decoder.add(out[:, :width], product[:, :width], units[0], written)

    def _finish(self, part: _Part) -> None:
        """Add to the loss, and to the gradients what the targets add to them."""
        index, rows, group = part.group, part.rows, self.rows[part.group]
        w, y, x = self.weights[index][rows], group.targets[rows], self.features[index][rows]
        x, width = x.to(w.dtype), x.shape[1]
        hard, uniform, soft = self._shares(index)
        lse, label = (values[: part.size] / _LOG2_E for values in (part.normalizer, part.label))
        zeta, grad = self.options.z_loss_weight, self.grads[index][rows]
        value = lse + zeta * lse.square() - hard * label
        if uniform:
            value = value - uniform * (x @ self.mean_weight[:width] + self.mean_bias)
        if soft:
            tokens = group.tokens[rows]
            taught = self.taught_weight[tokens, :width]
            value = value + soft * (self.negative_entropy[tokens] - (x * taught).sum(1) - self.taught_bias[tokens])
        self.loss += (value * w).sum()
        if self._teaches(index):
            self.taught_weight[rows] = grad
            self.negative_entropy[rows] = (x * grad).sum(1) + self.taught_bias[rows] - lse
        if not self.differentiate:
            return
        # Until here the expected weight of the decoder.
        grad *= (w * (1.0 + 2.0 * zeta * lse))[:, None]
        grad -= (w * hard)[:, None] * self.decoder.weight[y, :width].to(w.dtype)
        if uniform:
            grad -= (w * uniform)[:, None] * self.mean_weight[:width]
        if soft:
            grad -= (w * soft)[:, None] * taught
        spread = w * uniform / self.decoder.classes
        if self.grad_weight is not None:
            out = self.grad_weight[:, :width]
            out.index_add_(0, y, (x * (-w * hard)[:, None]).to(out.dtype))
            if uniform:
                self.spread[:width] += spread @ x
        if self.grad_bias is not None:
            self.grad_bias.index_add_(0, y, -w * hard)
            self.grad_bias -= spread.sum()


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
