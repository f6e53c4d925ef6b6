"""Undo the collapse of a briefly pretrained encoder before it is fine-tuned to embed texts."""

from typing import Any

import torch

from .modeling_m3bert import M3BertModel


@torch.no_grad()
def whiten_embeddings(model: M3BertModel, token_counts: torch.Tensor, residual_scale: float = 0.01) -> None:
    """Give the embeddings of tokens, as often as they occur, mean zero and equal variance without correlation.

    With tied embeddings, masked language modelling first pushes all rows of the matrix, and with them all states, into
    a few common directions (representation degeneration: Gao et al. 2019, arXiv 1907.12009). A long run leaves that
    phase; after a short one, all texts have nearly the same vector and contrastive training crawls. Whitening by the
    tokens' frequency (Zipfian whitening: Yokoi et al. 2024, arXiv 2411.00680) spreads the rows over all directions and
    keeps which tokens are near one another; without the frequencies, the frequent tokens, of which every text is full,
    stay close together. The layers wrote into the old directions: their contribution is scaled down, and grows again
    where fine-tuning wants it. The gains of the first and the last norm become 1, and learned positions, which would
    outweigh the tokens, get a tenth of the scale of new weights.

    Args:
        model: Changed in place. A masked-language head that it had no longer fits.
        token_counts: Occurrences of each token in the texts to come [vocab_size]; tokens that do not occur count
            as one.
        residual_scale: Factor on the output projections of attention and feed-forward.

    Raises:
        ValueError: If the scale is negative or the counts do not fit the vocabulary.
    """
    weight = model.embeddings.word_embeddings.weight
    if residual_scale < 0:
        raise ValueError(f"residual_scale={residual_scale} must be at least 0.")
    if token_counts.shape != weight.shape[:1]:
        raise ValueError(
            f"token_counts has shape {tuple(token_counts.shape)}; the vocabulary has {len(weight)} tokens."
        )
    share = token_counts.double().clamp_min(1)[:, None].to(weight.device)
    share = share / share.sum()
    centred = weight.double() - (share * weight.double()).sum(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ (share * centred))
    # The floor keeps directions that hold nothing but rounding from being blown up to the size of the others.
    spread = (values.clamp_min(0) + 1e-3 * values.mean()).rsqrt()
    # Through the symmetric root (ZCA), which moves the rows least.
    weight.copy_(model.config.initializer_range * centred @ (vectors * spread) @ vectors.T)
    layers: Any = model.layers
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_(residual_scale)
        layer.mlp.down_proj.weight.mul_(residual_scale)
    positions = model.embeddings.position_embeddings
    if positions is not None:
        positions.weight.sub_(positions.weight.mean(dim=0))
        positions.weight.mul_(0.1 * model.config.initializer_range / positions.weight.std().clamp_min(1e-12))
    model.embeddings.norm.weight.fill_(1.0)
    if model.norm is not None:
        model.norm.weight.fill_(1.0)


__all__ = ["whiten_embeddings"]
