"""Any sentence-transformers loss at every (exit, dimension), from one pass of the encoder."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from torch import Tensor, nn

from .sentence_transformer import M3BertSentenceTransformer, exit_embeddings, unwrap


class _StandIn(nn.Module):
    """Takes a model's place within a loss; what it does not define itself, it asks the model for."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._model = [model]  # in a list, so that the model is not a submodule of two modules

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._model[0], name)


class _StackedExits(_StandIn):
    """Stands in for the model within a cached loss: its vectors are those of all exits, [batch, exits, width]."""

    def __init__(self, model: nn.Module, exit_layers: Sequence[int]):
        super().__init__(model)
        self._exit_layers = exit_layers

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        exits = exit_embeddings(self._model[0], features, self._exit_layers)
        return {**features, "sentence_embedding": torch.stack(exits, dim=1)}


class _GivenEmbeddings(_StandIn):
    """Stands in for the model within a loss that encodes by itself: returns columns of vectors that exist already."""

    def __init__(self, model: nn.Module, columns: list[Tensor]):
        super().__init__(model)
        self._rows = torch.cat(columns)
        self._sizes = {len(column) for column in columns}
        self._next = 0

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        boundaries = features.get("cu_seq_lens_q")
        # The library may join columns into one call; rows come in the order of the columns either way.
        size = len(features["input_ids"]) if boundaries is None else len(boundaries) - 1
        if self._next + size > len(self._rows):
            raise TypeError("The loss encodes more texts than its columns hold: MultigranularLoss cannot wrap it.")
        rows = self._rows[self._next : self._next + size]
        self._next += size
        return {**features, "sentence_embedding": rows}


class _Remembered(_StandIn):
    """Stands in for a guide model: runs it for the first granularity and repeats its answers for the others."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._answers: list[Any] = []
        self._next = 0

    def rewind(self) -> None:
        self._next = 0

    def _answer(self, function: Callable, *args, **kwargs) -> Any:
        if self._next == len(self._answers):
            self._answers.append(function(*args, **kwargs))
        self._next += 1
        return self._answers[self._next - 1]

    def preprocess(self, *args, **kwargs) -> Any:
        preprocess: Any = self._model[0].preprocess
        return self._answer(preprocess, *args, **kwargs)

    def forward(self, *args, **kwargs) -> Any:
        return self._answer(self._model[0], *args, **kwargs)


@contextmanager
def _standing_in(replacements: Sequence[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Put other modules in the place of a loss's children within the context; the models themselves stay untouched."""
    before = [(owner, name, owner._modules[name]) for owner, name, _ in replacements]
    try:
        for owner, name, module in replacements:
            owner._modules[name] = module
        yield
    finally:
        for owner, name, child in before:
            owner._modules[name] = child


class MultigranularLoss(nn.Module):
    """Weighted sum of a sentence-transformers loss over (exit, dimension) pairs.

    The encoder runs once for each column and no deeper than the deepest pair; each exit is normed and pooled once; a
    dimension is a slice, normalised anew. What an exit gives here is what `encode(..., exit_layer=l, truncate_dim=d,
    normalize_embeddings=True)` gives. Works with every loss of the library that reads the vectors of its columns:

    - those that compute from embeddings (MultipleNegativesRanking, CoSENT, MarginMSE, ...) get slices;
    - the cached ones (GradCache, arXiv 2101.06983: CachedMultipleNegativesRanking, CachedGISTEmbed, ...) cache the
      gradient of all exits together, [batch, exits, width], and replay the encoder once for all pairs;
    - those that encode by themselves (GISTEmbed, ...) are handed the vectors; a guide model runs once for all pairs.

    The sum is linear in the pairs' losses, so gradient accumulation and data parallelism change nothing, as for the
    wrapped loss.

    Alignment pulls every pair towards the deepest exit, which is detached; it adds `align_weight` times the sum, over
    the pairs below the deepest exit, of:

    - `align="similarity"`: KL divergence of a pair's in-batch similarity distribution (first column against the
      others; texts of a single column against one another) from that of the deepest exit at the widest dimension, at
      temperature `align_temperature`. It teaches the ranking, each exit within its own space.
    - `align="embedding"`: 1 - cosine between the pair's vectors and the deepest exit's at the same dimension, averaged
      over all texts. It teaches one space, which searching deep documents with shallow queries needs.

    Args:
        model: An `M3BertSentenceTransformer`.
        loss: Loss of sentence-transformers, such as `MultipleNegativesRankingLoss(model)`.
        granularities: Pairs (exit layer, dimension); `None` means all exits and matryoshka dimensions of the model.
        weights: One weight for each pair; `None` means 1 for each.
        align_weight: Weight of the alignment; 0 leaves it out.
        align: What is aligned, see above.
        align_temperature: Of the similarities in `align="similarity"`.
        normalize_embeddings: Give the wrapped loss unit vectors at every dimension, as search compares them. Losses by
            cosine similarity are the same either way.

    Raises:
        ValueError: If a pair does not exist in the model, the weights do not fit the pairs, or an option has no such
            value.
        TypeError: If the model is not an m3BERT, or the loss is of a kind that cannot be wrapped.
    """

    def __init__(
        self,
        model: M3BertSentenceTransformer,
        loss: Any,
        granularities: Sequence[tuple[int, int]] | None = None,
        weights: Sequence[float] | None = None,
        align_weight: float = 0.0,
        align: Literal["similarity", "embedding"] = "similarity",
        align_temperature: float = 0.05,
        normalize_embeddings: bool = True,
    ):
        super().__init__()
        if not isinstance(model, M3BertSentenceTransformer):
            raise TypeError(
                f"MultigranularLoss needs an M3BertSentenceTransformer, which gives all exits in one pass; got "
                f"{type(model).__name__}. Load the checkpoint with m3bert_hf.build_sentence_transformer(path)."
            )
        if not isinstance(loss, nn.Module) or not isinstance(getattr(loss, "model", None), nn.Module):
            raise TypeError(
                f"{type(loss).__name__} is not a loss that MultigranularLoss can wrap: it needs one of "
                "sentence-transformers, which keeps its model in `model`."
            )
        if hasattr(loss, "matryoshka_dims") or hasattr(loss, "n_layers_per_step"):
            raise TypeError(
                f"{type(loss).__name__} chooses dimensions or layers itself: give MultigranularLoss the loss inside."
            )
        config = model.transformers_model.config
        if granularities is None:
            granularities = [(e, d) for e in config.exit_layers for d in model.matryoshka_dimensions]
        if not granularities:
            raise ValueError("granularities is empty: name pairs (exit layer, dimension), or None for all.")
        for exit_layer, dimension in granularities:
            config.resolve_exit_layer(exit_layer)
            config.resolve_truncate_dim(dimension)
            if dimension > model.embedding_width:
                raise ValueError(
                    f"truncate_dim={dimension} does not exist: this model's vectors have {model.embedding_width} "
                    "dimensions."
                )
        if weights is not None and len(weights) != len(granularities):
            raise ValueError(f"{len(weights)} weights do not fit {len(granularities)} granularities.")
        if align not in ("similarity", "embedding"):
            raise ValueError(f"align={align!r} does not exist: choose 'similarity' or 'embedding'.")
        if align_weight < 0 or align_temperature <= 0:
            raise ValueError(
                f"align_weight={align_weight} must be at least 0, align_temperature={align_temperature} above 0."
            )
        self.model = model
        self.loss = loss
        self.granularities = [(int(e), int(d)) for e, d in granularities]
        self.weights = [1.0] * len(self.granularities) if weights is None else [float(w) for w in weights]
        self.align_weight = float(align_weight)
        self.align = align
        self.align_temperature = float(align_temperature)
        self.normalize_embeddings = normalize_embeddings
        self.exit_layers = sorted({e for e, _ in self.granularities})
        self.width = model.embedding_width
        # Distillation losses compute from a teacher's vectors in the place of labels: those encode by themselves here.
        compute = getattr(loss, "compute_loss_from_embeddings", None)
        self._computes_from_embeddings = compute is not None and "labels" in signature(compute).parameters
        self.uses_gradient_cache = uses_gradient_cache(loss)
        if self.uses_gradient_cache:
            self._wrap_cached_loss()

    # ------------------------------------------------------------------ the sum over pairs

    def _vectors(self, column: Tensor, exit_layer: int, dimension: int) -> Tensor:
        """Slice stacked exits [batch, exits, width] to the vectors of a pair [batch, dimension]."""
        vectors = column[:, self.exit_layers.index(exit_layer), :dimension]
        return F.normalize(vectors, dim=-1) if self.normalize_embeddings else vectors

    def _labels(self, labels: Any, dimension: int) -> Any:
        # Losses that learn a teacher's vectors have them as labels: they are cut as the prediction is.
        if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.shape[-1] != self.width:
            return labels
        return labels[..., :dimension]

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Return the weighted sum of the losses of all pairs, and the alignment (a scalar).

        Args:
            sentence_features: Preprocessed texts of each column.
            labels: As the wrapped loss takes them.

        Raises:
            TypeError: If the wrapped loss encodes other texts than those of its columns.
        """
        features = list(sentence_features)
        if self.uses_gradient_cache:
            return self.loss(features, labels)
        columns = [torch.stack(exit_embeddings(self.model, column, self.exit_layers), dim=1) for column in features]
        guides = [
            (owner, name, _Remembered(child))
            for owner in self.loss.modules()
            for name, child in owner._modules.items()
            if name != "model" and child is not None and hasattr(child, "preprocess") and hasattr(child, "encode")
        ]
        total = columns[0].new_zeros((), dtype=torch.float32)
        with _standing_in(guides):
            for (exit_layer, dimension), weight in zip(self.granularities, self.weights, strict=True):
                vectors = [self._vectors(column, exit_layer, dimension) for column in columns]
                total = total + weight * self._one_loss(features, vectors, labels, dimension)
                for _, _, guide in guides:
                    guide.rewind()
        if self.align_weight:
            total = total + self.align_weight * self._alignment(columns, slice(None))
        return total

    def _one_loss(
        self, features: list[dict[str, Tensor]], vectors: list[Tensor], labels: Any, dimension: int
    ) -> Tensor:
        loss: Any = self.loss
        if self._computes_from_embeddings:
            value = loss.compute_loss_from_embeddings(vectors, labels)
        else:
            core = unwrap(self.model)
            owners = [
                owner
                for owner in loss.modules()
                for name, child in owner._modules.items()
                if name == "model" and child is not None and unwrap(child) is core
            ]
            given = _GivenEmbeddings(core, vectors)
            with _standing_in([(owner, "model", given) for owner in owners]):
                value = loss([dict(column) for column in features], self._labels(labels, dimension))
        # Some losses name their parts; the trainer would add them up as well.
        return torch.stack(list(value.values())).sum() if isinstance(value, dict) else value

    # ------------------------------------------------------------------ alignment

    def _alignment(self, columns: list[Tensor], rows: slice) -> Tensor:
        """Return the alignment of the texts in `rows`, a mean over all texts of the batch.

        Args:
            columns: Stacked exits of each column [batch, exits, width].
            rows: Texts of the first column (of each column, for `align="embedding"`) to take into account.
        """
        deepest = self.exit_layers[-1]
        pairs = [(e, d) for e, d in self.granularities if e != deepest]
        total = columns[0].new_zeros((), dtype=torch.float32)
        batch = len(columns[0])
        if self.align == "embedding":
            for exit_layer, dimension in pairs:
                for column in columns:
                    teacher = column[rows, -1, :dimension].detach()
                    student = column[rows, self.exit_layers.index(exit_layer), :dimension]
                    missing = 1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
                    total = total + missing.sum() / (batch * len(columns))
            return total
        widest = max(d for _, d in self.granularities)
        teacher = self._similarities([c.detach() for c in columns], deepest, widest, rows).log_softmax(dim=-1)
        for exit_layer, dimension in pairs:
            student = self._similarities(columns, exit_layer, dimension, rows).log_softmax(dim=-1)
            total = total + F.kl_div(student, teacher, reduction="sum", log_target=True) / batch
        return total

    def _similarities(self, columns: list[Tensor], exit_layer: int, dimension: int, rows: slice) -> Tensor:
        vectors = [F.normalize(c[:, self.exit_layers.index(exit_layer), :dimension].float(), dim=-1) for c in columns]
        texts = vectors[0][rows]
        scores = texts @ torch.cat(vectors[1:] or vectors).T / self.align_temperature
        if len(vectors) == 1:
            # A text's similarity to itself says nothing; a large negative number, as -inf times 0 is not a number.
            own = torch.arange(len(vectors[0]), device=scores.device)[rows]
            scores = scores.scatter(1, own[:, None], -1e4)
        return scores

    # ------------------------------------------------------------------ cached losses

    def _wrap_cached_loss(self) -> None:
        """Make a cached loss carry all exits in its cache and sum over the pairs where it computes its value."""
        for name in ("calculate_loss", "embed_minibatch"):
            if not hasattr(self.loss, name):
                raise TypeError(f"{type(self.loss).__name__} has no `{name}`: MultigranularLoss cannot wrap it.")
        loss: Any = self.loss
        embed, calculate = loss.embed_minibatch, loss.calculate_loss

        def embed_minibatch(*args, **kwargs):
            # The loss itself keeps the model, wrapped for data parallelism or not, which its replay asks for.
            stacked = _StackedExits(loss.model, self.exit_layers)
            with _standing_in([(loss, "model", stacked)]):
                return embed(*args, **kwargs)

        def calculate_loss(reps: list[list[Tensor]], *args, with_backward: bool = False, **kwargs) -> Tensor:
            return self._cached_sum(calculate, reps, args, with_backward, kwargs)

        loss.embed_minibatch = embed_minibatch
        loss.calculate_loss = calculate_loss

    def _cached_sum(
        self, calculate: Any, reps: list[list[Tensor]], args: tuple, backward: bool, kwargs: dict
    ) -> Tensor:
        """Sum a cached loss over the pairs; with `backward`, leave the gradient in each `reps[...].grad`."""
        total = reps[0][0].new_zeros((), dtype=torch.float32)
        if backward:
            for rep in (rep for column in reps for rep in column):
                rep.grad = torch.zeros_like(rep)
        for (exit_layer, dimension), weight in zip(self.granularities, self.weights, strict=True):
            pair = [[self._vectors(rep, exit_layer, dimension) for rep in column] for column in reps]
            # The loss runs backward itself, down to these leaves; from there on it goes through slice and norm.
            leaves = [[v.detach().requires_grad_(backward) for v in column] for column in pair]
            value = calculate(leaves, *args, **({"with_backward": True} if backward else {}), **kwargs)
            total = total + weight * value.detach()
            if backward:
                for vectors, leaf in (
                    (v, x) for vs, xs in zip(pair, leaves, strict=True) for v, x in zip(vs, xs, strict=True)
                ):
                    if leaf.grad is not None:
                        vectors.backward(weight * leaf.grad)
        if self.align_weight:
            size = max(int(getattr(self.loss, "mini_batch_size", 0) or 0), 256)
            for start in range(0, sum(map(len, reps[0])), size):
                with torch.set_grad_enabled(backward):
                    columns = [torch.cat(column) for column in reps]
                    value = self.align_weight * self._alignment(columns, slice(start, start + size))
                if backward:
                    value.backward()
                total = total + value.detach()
        return total

    # ------------------------------------------------------------------ description

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card names."""
        return {
            "loss": type(self.loss).__name__,
            "granularities": [list(pair) for pair in self.granularities],
            "weights": self.weights,
            "align_weight": self.align_weight,
            "align": self.align,
            "align_temperature": self.align_temperature,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for sentence-transformers' model cards."""
        return (
            "@misc{m3bert,\n    title={m3BERT},\n    eprint={2605.19568},\n    archivePrefix={arXiv},\n"
            "    year={2026},\n}\n"
        )


__all__ = ["MultigranularLoss"]
