"""Documents that follow one another in one row without padding, and the way back to padded rows."""

import torch
import torch.nn.functional as F


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
    # On a CPU, documents that are slices of the row need no copies, padding or mask: those of `alone` tokens and more,
    # one by one, and neighbours that are equally long, as sorted texts often are, from `run` tokens on, in one call.
    # Others share a call in groups, which takes half the time of calls for each in bfloat16 with 24 to 57 tokens (from
    # 64 on, and in float32, a batch takes the same time within the noise). So do all on a GPU, where each call is a
    # launch, and where gradients are wanted, since that of a slice is as large as the row it was taken from.
    alone, run = 64, 32
    # Pairs of tokens in a call of neighbours: attention weights, where they exist, stay as small as those of a text.
    pairs = 2**18

    def __init__(self, lengths: list[int], device):
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        slicing = torch.device(device).type == "cpu" and not torch.is_grad_enabled()
        documents = [i for i, length in enumerate(lengths) if length]
        groups: list[list[int]] = []
        for i in documents if slicing else []:
            length = lengths[i]
            full = bool(groups) and (len(groups[-1]) + 1) * length**2 > self.pairs
            if not groups or full or groups[-1][-1] != i - 1 or lengths[i - 1] != length:
                groups.append([])
            groups[-1].append(i)
        groups = [same for same in groups if lengths[same[0]] >= (self.alone if len(same) == 1 else self.run)]
        spans = len(groups)
        others = sorted(set(documents).difference(*groups), key=lambda i: (-lengths[i], i))
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
        # Where each token of the row stands among the groups' places, one after another; nothing is to be moved if all
        # are in order.
        self.back = None
        if any(valid is not None for valid in self.valid) or [i for group in groups for i in group] != documents:
            tokens = [place.flatten() for place in self.places]
            among = torch.arange(sum(place.numel() for place in tokens), device=device)
            if any(valid is not None for valid in self.valid):
                held = [
                    torch.ones_like(place, dtype=torch.bool) if valid is None else valid
                    for place, valid in zip(self.places, self.valid, strict=True)
                ]
                among = among[torch.cat([valid.flatten() for valid in held])]
            self.back = torch.empty_like(among).scatter_(0, torch.cat(tokens)[among], among)

    def attend(self, function, module, query, key, value, masks, options) -> torch.Tensor:
        """Run an attention function within documents: [1, heads, tokens, head_dim] to [1, tokens, heads, head_dim]."""
        # Rows of one token each, which are copied faster than those of a head.
        tokens = [states[0].transpose(0, 1).flatten(1) for states in (query, key, value)]
        parts = []
        for place, span, mask in zip(self.places, self.slices, masks, strict=True):
            if span is not None:
                rows = [states[span].unflatten(0, place.shape) for states in tokens]
            else:
                rows = [F.embedding(place.to(states.device), states) for states in tokens]
            heads = [part.unflatten(-1, (-1, query.shape[-1])).transpose(1, 2) for part in rows]
            output, _ = function(module, *heads, mask, **options)
            parts.append(output.flatten(0, 1).flatten(1))
        if not parts:
            parts.append(tokens[0])
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.back is not None:
            together = F.embedding(self.back.to(together.device), together)
        return together.unflatten(-1, (query.shape[1], -1))[None]


def padded(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put the states of tokens [1, tokens, width] where a mask [batch, length] has them; padding is zero."""
    places = mask.flatten().nonzero().flatten()
    output = states.new_zeros(mask.numel(), states.shape[-1])
    return output.index_copy(0, places, states[0]).view(*mask.shape, -1)
