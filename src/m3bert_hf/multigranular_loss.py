"""Contrastive and other sentence-transformers losses at every (exit, dimension), from one pass of the encoder."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .sentence_transformer import M3BertSentenceTransformer, exit_embeddings


class MultigranularLoss(nn.Module):
    """Weighted sum of a sentence-transformers loss over (exit, dimension) pairs.

    The encoder runs once for each column; each exit is pooled once, and each dimension is a slice. What an exit gives
    here is what `encode(..., exit_layer=l, truncate_dim=d)` gives.

    Args:
        model: An `M3BertSentenceTransformer`.
        loss: A loss that computes from embeddings, such as `MultipleNegativesRankingLoss(model)`.
        granularities: Pairs (exit layer, dimension); `None` means all exits and matryoshka dimensions of the model.
        weights: One weight for each pair; `None` means 1 for each.

    Raises:
        ValueError: If a pair does not exist in the model, or the weights do not fit the pairs.
        TypeError: If the loss cannot compute from embeddings.
    """

    def __init__(
        self,
        model: M3BertSentenceTransformer,
        loss: Any,
        granularities: Sequence[tuple[int, int]] | None = None,
        weights: Sequence[float] | None = None,
    ):
        super().__init__()
        if not hasattr(loss, "compute_loss_from_embeddings"):
            raise TypeError(f"{type(loss).__name__} cannot compute from embeddings, which MultigranularLoss needs.")
        config = model.transformers_model.config
        if granularities is None:
            granularities = [(e, d) for e in config.exit_layers for d in config.matryoshka_dimensions]
        for exit_layer, dimension in granularities:
            config.resolve_exit_layer(exit_layer)
            config.resolve_truncate_dim(dimension)
        if weights is not None and len(weights) != len(granularities):
            raise ValueError(f"{len(weights)} weights do not fit {len(granularities)} granularities.")
        self.model = model
        self.loss = loss
        self.exit_layers = list(config.exit_layers)
        self.granularities = [(int(e), int(d)) for e, d in granularities]
        self.weights = [1.0] * len(self.granularities) if weights is None else [float(w) for w in weights]

    def forward(self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the losses of all granularities (a scalar)."""
        columns = [exit_embeddings(self.model, features) for features in sentence_features]
        total = torch.zeros((), device=columns[0][0].device)
        for (exit_layer, dimension), weight in zip(self.granularities, self.weights, strict=True):
            index = self.exit_layers.index(exit_layer)
            embeddings = [column[index][:, :dimension] for column in columns]
            value = weight * self.loss.compute_loss_from_embeddings(embeddings, labels)
            total = total + value
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card names."""
        return {
            "loss": type(self.loss).__name__,
            "granularities": [list(pair) for pair in self.granularities],
            "weights": self.weights,
        }


__all__ = ["MultigranularLoss"]
