"""Tokens that occur more than once in a batch, and the part of a model that sees no difference between them."""

import torch


class RepeatedTokens:
    """Which tokens of a batch are the same, for products that depend on the token alone and need one row for each.

    Before the first attention a model with rotary positions knows a token by its id alone, so that the queries, keys
    and values of the first layer, before their rotation, are those of the distinct tokens: four in ten of a batch of
    32 texts. Tables of them for a whole vocabulary are known (arXiv 2402.13388); the distinct tokens of a batch take
    no memory and follow the weights.

    Args:
        ids: Token ids of any shape, at least one.
    """

    # Of tokens, the fewest among which to look, and the largest share of distinct ones that pays for the copies.
    fewest, share = 64, 0.8

    def __init__(self, ids: torch.Tensor):
        distinct, self.places = ids.unique(return_inverse=True)
        self.count = distinct.numel()
        # Any occurrence of a token stands for all of them.
        order = torch.arange(ids.numel(), device=ids.device)
        self.rows = order.new_empty(self.count).scatter_(0, self.places.flatten(), order)

    @classmethod
    def find(cls, ids: torch.Tensor) -> "RepeatedTokens | None":
        """Return the repetitions within token ids if leaving them out makes a product faster, else `None`."""
        if ids.numel() < cls.fewest:
            return None
        repeated = cls(ids)
        return repeated if repeated.count <= cls.share * ids.numel() else None

    def select(self, states: torch.Tensor) -> torch.Tensor | None:
        """Return a row for each distinct token, [distinct tokens, width], of states [..., width].

        `None` if states of one token differ from place to place, as by what a hook adds to the embeddings, or if they
        are on another device than the ids.
        """
        if states.device != self.places.device:
            return None
        selected = states.flatten(0, -2)[self.rows]
        return selected if torch.equal(self.spread(selected), states) else None

    def spread(self, selected: torch.Tensor) -> torch.Tensor:
        """Return the rows [distinct tokens, width] at every place that their token has, [..., width]."""
        return torch.nn.functional.embedding(self.places, selected)
