"""Masking and batching for pretraining: which tokens are hidden is a function of the seed and the row alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .loss_m3bert import IGNORE_INDEX


# Scripts without spaces have no word boundaries in most vocabularies: a longer run is cut into words of this size.
_LONGEST_WORD = 8


def word_starts(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tell for each token id whether it begins a word [vocab_size].

    Understands Metaspace and SentencePiece ("▁"), byte-level BPE ("Ġ") and WordPiece ("##") vocabularies; a token that
    is all digits, punctuation or a special token begins a word as well.

    Args:
        tokenizer: Any tokenizer.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    if any(token.startswith("##") for token in tokens):
        starts = [not token.startswith("##") for token in tokens]
    else:
        starts = [token.startswith(("▁", "Ġ", " ")) for token in tokens]
    return np.array([s or t in special for s, t in zip(starts, tokens, strict=True)])


class M3BertDataCollator:
    """Mask tokens for prediction, and batch documents packed into rows or padded.

    Which tokens are masked depends on `seed` and the row's `index` alone: on no global state, and not on workers,
    processes or the batch that the row is in. A row without an index draws from torch's global generator.

    Args:
        tokenizer: With `mask_token` and `pad_token`.
        mask_ratio: Share of tokens to predict, or two values between which it moves linearly over the run (mmBERT,
            arXiv 2509.06888, lowers it from 0.3 to 0.05).
        total_rows: Rows of the run, for a ratio that moves.
        replace: Shares of the tokens to predict that become the mask token, a random token, and stay as they are.
            BERT's (0.8, 0.1, 0.1) by default; (1, 0, 0) masks all, as ModernBERT does.
        whole_words: Mask all tokens of a word together.
        row_length: Pack the documents of a row, which must fit, into one row of this length; they do not see one
            another. `None` pads each document to the longest of the batch.
        longest_document: Longest position that the model takes, for the padding of a packed row; `None` is
            `row_length`.
        pad_to_multiple_of: Round the longest up, when padding.
        seed: Of the masks.

    Raises:
        ValueError: If the tokenizer has no mask or padding token, or an argument is out of its range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_ratio: float | Sequence[float] = 0.3,
        total_rows: int | None = None,
        replace: Sequence[float] = (0.8, 0.1, 0.1),
        whole_words: bool = False,
        row_length: int | None = None,
        longest_document: int | None = None,
        pad_to_multiple_of: int | None = 8,
        seed: int = 0,
    ):
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("Masked pretraining needs a tokenizer with `mask_token` and `pad_token`.")
        ratios = [float(r) for r in (mask_ratio if isinstance(mask_ratio, Sequence) else [mask_ratio])]
        if not 1 <= len(ratios) <= 2 or not all(0.0 < r <= 1.0 for r in ratios):
            raise ValueError(f"`mask_ratio` must be one or two numbers above 0 and at most 1, got {mask_ratio}.")
        if len(ratios) == 2 and not total_rows:
            raise ValueError(f"A `mask_ratio` that moves from {ratios[0]} to {ratios[1]} needs `total_rows`.")
        if len(replace) != 3 or min(replace) < 0 or abs(sum(replace) - 1.0) > 1e-6:
            raise ValueError(f"`replace` must be three shares that add up to 1 (mask, random, kept), got {replace}.")
        self.mask_id, self.pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        special = np.zeros(len(tokenizer), dtype=bool)
        special[[i for i in tokenizer.all_special_ids if i < len(tokenizer)]] = True
        self.special = special
        self.ordinary = np.flatnonzero(~special)
        self.starts = word_starts(tokenizer) if whole_words else None
        self.ratios, self.total_rows, self.replace = ratios, total_rows or 1, tuple(replace)
        self.row_length, self.pad_to_multiple_of, self.seed = row_length, pad_to_multiple_of, seed
        self.longest_document = longest_document or row_length

    def ratio(self, index: int | None) -> float:
        """Return the masking ratio of a row."""
        if len(self.ratios) == 1 or index is None:
            return self.ratios[-1]
        progress = min(index / max(self.total_rows - 1, 1), 1.0)
        return self.ratios[0] + (self.ratios[1] - self.ratios[0]) * progress

    def mask(self, ids: np.ndarray, index: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids with some replaced, and the labels [tokens], `-100` where nothing is to be predicted."""
        key = (self.seed, index) if index is not None else (int(torch.randint(2**62, ())),)
        rng = np.random.default_rng(key)
        candidates = np.flatnonzero(~self.special[ids])
        # Rounded at random, so that short rows are masked at the ratio on average as well.
        wanted = int(self.ratio(index) * len(candidates) + rng.random())
        if self.starts is None:
            chosen = candidates[rng.permutation(len(candidates))[:wanted]]
        else:
            chosen = self._whole_words(self.starts[ids], candidates, wanted, rng)
        labels = np.full_like(ids, IGNORE_INDEX)
        labels[chosen] = ids[chosen]
        masked = ids.copy()
        draw = rng.random(len(chosen))
        masked[chosen[draw < self.replace[0]]] = self.mask_id
        random = chosen[(draw >= self.replace[0]) & (draw < self.replace[0] + self.replace[1])]
        masked[random] = self.ordinary[rng.integers(len(self.ordinary), size=len(random))]
        return masked, labels

    def _whole_words(self, starts, candidates, wanted, rng) -> np.ndarray:
        if not len(candidates):
            return candidates
        gap = np.diff(candidates, prepend=candidates[0] - 2) > 1
        word = np.cumsum(starts[candidates] | gap)
        within = np.arange(len(candidates)) - np.searchsorted(word, word, side="left")
        word = np.cumsum(np.diff(word, prepend=word[0]).astype(bool) | ((within % _LONGEST_WORD == 0) & (within > 0)))
        sizes = np.bincount(word)
        order = rng.permutation(len(sizes))
        # The word at which the count is reached is taken or left at random, so that the ratio holds on average.
        ends = np.cumsum(sizes[order])
        number = int(np.searchsorted(ends, wanted, side="right"))
        if number < len(order):
            missing = wanted - (ends[number - 1] if number else 0)
            number += int(rng.random() * sizes[order[number]] < missing)
        taken = np.zeros(len(sizes), dtype=bool)
        taken[order[:number]] = True
        return candidates[taken[word]]

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Batch rows.

        Args:
            examples: Each with `documents`, a list of token ids with special tokens, or `input_ids` of one document;
                and perhaps `index`, the row's place in the run.

        Returns:
            `input_ids` and `labels` [rows, tokens], int64, with `position_ids` if packed (they begin again at 0 with
            every document) and with `attention_mask` if padded.

        Raises:
            ValueError: If the documents of a row do not fit into it.
        """
        rows = []
        for example in examples:
            documents = example["documents"] if "documents" in example else [example["input_ids"]]
            documents = [np.asarray(document, dtype=np.int64) for document in documents]
            rows.append((documents, *self.mask(np.concatenate(documents), example.get("index"))))
        return self._pad(rows) if self.row_length is None else self._pack(rows, self.row_length)

    def _pack(self, rows, length: int) -> dict[str, torch.Tensor]:
        longest = self.longest_document or length
        ids = np.full((len(rows), length), self.pad_id)
        labels = np.full((len(rows), length), IGNORE_INDEX)
        positions = np.zeros((len(rows), length), dtype=np.int64)
        for row, (documents, masked, targets) in enumerate(rows):
            used = len(masked)
            if used > length:
                raise ValueError(f"A row of {used} tokens does not fit into row_length={length}.")
            ids[row, :used], labels[row, :used] = masked, targets
            # Padding is a document of its own, or several where positions would run out: nothing attends to it.
            sizes = [len(document) for document in documents]
            rest = length - used
            sizes += [longest] * (rest // longest) + [rest % longest]
            positions[row] = np.concatenate([np.arange(size) for size in sizes])
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }

    def _pad(self, rows) -> dict[str, torch.Tensor]:
        length = max(len(masked) for _, masked, _ in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = np.full((len(rows), length), self.pad_id)
        labels = np.full((len(rows), length), IGNORE_INDEX)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for row, (_, masked, targets) in enumerate(rows):
            ids[row, : len(masked)], labels[row, : len(masked)], mask[row, : len(masked)] = masked, targets, 1
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.from_numpy(mask),
        }


__all__ = ["M3BertDataCollator", "word_starts"]
