"""Documents that follow one another in one row without padding, and the way back to padded rows."""

import torch


class PackedDocuments:
    """Documents that follow one another in one row, grouped by length for attention kernels that take rows of padding.

    Everything but attention sees each token once and no padding. For attention, documents of like length form the rows
    of a group, so that neither a mask of [tokens, tokens] nor the longest document sets the cost.

    Args:
        lengths: Tokens of each document, in order.
        device: Of the model's input.
    """

    # A group takes documents down to this share of its longest one: rows are at least that full.
    fullness = 0.75
    # On a CPU, documents of this many tokens are attended to as slices without copies, padding or mask: one by one, or
    # in one call where neighbours are equally long, as sorted texts often are. Shorter ones share a call in groups
    # (the number was not tuned). So do all on a GPU, where each call is a launch, and where gradients are wanted,
    # since that of a slice is as large as the row it was taken from.
    alone = 32
    # Pairs of tokens in a call of neighbours: attention weights, where they exist, stay as small as those of a text.
    pairs = 2**18

    def __init__(self, lengths: list[int], device):
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        slicing = torch.device(device).type == "cpu" and not torch.is_grad_enabled()
        alone = self.alone if slicing else max(lengths, default=0) + 1
        groups: list[list[int]] = []
        for i, length in enumerate(lengths):
            if length < alone:
                continue
            full = bool(groups) and (len(groups[-1]) + 1) * length**2 > self.pairs
            if not groups or full or groups[-1][-1] != i - 1 or lengths[i - 1] != length:
                groups.append([])
            groups[-1].append(i)
        spans = len(groups)
        others = sorted((i for i, length in enumerate(lengths) if 0 < length < alone), key=lambda i: -lengths[i])
        for place, document in enumerate(others):
            if place == 0 or lengths[document] < self.fullness * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(document)
        # For each group the places of its tokens [documents, longest], padding pointing at the document's first token,
        # and which of them are tokens.
        self.places: list[torch.Tensor] = []
        self.valid: list[torch.Tensor | None] = []
        self.slices: list[slice | None] = []
        for index, group in enumerate(groups):
            first = torch.tensor([starts[i] for i in group], device=device)[:, None]
            sizes = torch.tensor([lengths[i] for i in group], device=device)[:, None]
            offset = torch.arange(int(lengths[group[0]]), device=device)[None]
            valid = offset < sizes
            self.places.append(first + offset * valid)
            self.valid.append(None if lengths[group[-1]] == lengths[group[0]] else valid)
            # A short document that is alone in its group needs no copies either.
            whole = index < spans or (slicing and len(group) == 1)
            self.slices.append(slice(starts[group[0]], starts[group[-1] + 1]) if whole else None)
        # Where each token of the row stands among the groups' tokens; nothing is to be moved if all are in order.
        order = [document for group in groups for document in group]
        self.back = None
        if order != sorted(order):
            tokens = [
                place.flatten() if valid is None else place[valid]
                for place, valid in zip(self.places, self.valid, strict=True)
            ]
            self.back = torch.cat(tokens).argsort()

    def attend(self, function, module, query, key, value, masks, options) -> torch.Tensor:
        """Run an attention function within documents: [1, heads, tokens, head_dim] to [1, tokens, heads, head_dim]."""
        parts = []
        for place, valid, span, mask in zip(self.places, self.valid, self.slices, masks, strict=True):
            if span is not None:
                shape = (place.shape[0], place.shape[1])
                rows = [states[0, :, span].unflatten(1, shape).transpose(0, 1) for states in (query, key, value)]
            else:
                rows = [states[0].transpose(0, 1)[place].transpose(1, 2) for states in (query, key, value)]
            output, _ = function(module, *rows, mask, **options)
            parts.append(output.flatten(0, 1) if valid is None else output[valid])
        together = torch.cat(parts) if parts else query.new_zeros(0, query.shape[1], query.shape[3])
        return (together if self.back is None else together[self.back])[None]


def padded(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put the states of tokens [1, tokens, width] where a mask [batch, length] has them; padding is zero."""
    places = mask.flatten().nonzero().flatten()
    output = states.new_zeros(mask.numel(), states.shape[-1])
    return output.index_copy(0, places, states[0]).view(*mask.shape, -1)
