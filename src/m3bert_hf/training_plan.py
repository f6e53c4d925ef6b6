"""The order of pretraining, fixed before it starts: which pieces of which languages make up which row.

A plan is a function of the corpus and a seed. Row i is the same on every machine, for every number of processes and
workers, and after every restart, so that a resumed run goes on exactly where it stopped.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from .corpus import TokenizedCorpus


# Rows planned together: enough to fill them well, few enough for schedules to move smoothly.
_ROWS_PER_SEGMENT = 256


@dataclass
class TrainingPlan:
    """Rows of a training run, in order.

    Attributes:
        pieces: Piece indices of all rows, one row after another, int64.
        starts: Where each row begins in `pieces`, and the end of the last [rows + 1], int64.
    """

    pieces: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.pieces[self.starts[row] : self.starts[row + 1]]

    def fingerprint(self) -> str:
        """Return a hash of the whole order, by which a resumed run knows that it is the same."""
        return hashlib.sha1(self.pieces.tobytes() + self.starts.tobytes()).hexdigest()[:16]


def temperature_shares(
    tokens: Sequence[float] | np.ndarray, temperature: float, room: Sequence[float] | np.ndarray, wanted: float
) -> np.ndarray:
    """Share `wanted` tokens among languages in proportion to tokens ** temperature, none above its room.

    What a language has no room for is shared among the others (exponential smoothing as in XLM-R, arXiv 1911.02116).

    Args:
        tokens: Tokens that each language has [languages].
        temperature: 1 keeps the proportions, 0 makes the languages equal.
        room: Most tokens that each may get [languages].
        wanted: Tokens to share; all of the room if it is less.

    Returns:
        Tokens of each language [languages].
    """
    sizes, limit = np.asarray(tokens, dtype=np.float64), np.asarray(room, dtype=np.float64)
    shares = np.zeros_like(sizes)
    is_open = (sizes > 0) & (limit > 0)
    left = float(wanted)
    while is_open.any() and left > 1e-9:
        weights = np.where(is_open, np.maximum(sizes, 1e-9) ** temperature, 0.0)
        asked = left * weights / weights.sum()
        full = is_open & (asked >= limit)
        if not full.any():
            return shares + asked
        shares[full] = limit[full]
        left -= limit[full].sum()
        is_open &= ~full
    return shares


def first_fit(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Pack items into bins of at most `budget`, longest first, each into the first bin with room.

    Args:
        lengths: Length of each item [items]; none above `budget`.
        budget: Room of a bin.

    Returns:
        Indices of the items in each bin.
    """
    order = np.argsort(-lengths, kind="stable")
    room = np.zeros(len(lengths), dtype=np.int64)
    bins: list[list[int]] = []
    opened = 0
    # Bins too full for the shortest item are passed over from the front.
    first, shortest = 0, int(lengths.min()) if len(lengths) else 0
    for item in order:
        length = int(lengths[item])
        fits = np.flatnonzero(room[first:opened] >= length)
        if len(fits):
            place = first + int(fits[0])
        else:
            place, opened = opened, opened + 1
            room[place] = budget
            bins.append([])
        room[place] -= length
        bins[place].append(int(item))
        while first < opened and room[first] < shortest:
            first += 1
    return [np.array(items, dtype=np.int64) for items in bins]


class _LanguageStream:
    """Pieces of one language in random order, over and over, each time in another order."""

    def __init__(self, pieces: np.ndarray, lengths: np.ndarray, seed: Sequence[int]):
        self.pieces, self.lengths, self.seed = pieces, lengths, list(seed)
        self.cycle, self.at, self.owed = 0, 0, 0.0
        self._shuffle()

    def _shuffle(self) -> None:
        order = np.random.default_rng([*self.seed, self.cycle]).permutation(len(self.pieces))
        self.order = self.pieces[order]
        self.ends = np.cumsum(self.lengths[order])

    def take(self, tokens: float) -> np.ndarray:
        """Return the next pieces, about `tokens` of them; what is given too much is taken off the next time."""
        self.owed += tokens
        taken = []
        while self.owed > 0:
            before = self.ends[self.at - 1] if self.at else 0
            upto = int(np.searchsorted(self.ends, before + self.owed, side="left")) + 1
            upto = min(upto, len(self.order))
            taken.append(self.order[self.at : upto])
            self.owed -= float(self.ends[upto - 1] - before)
            self.at = upto
            if self.at == len(self.order):
                self.cycle, self.at = self.cycle + 1, 0
                self._shuffle()
        return np.concatenate(taken) if taken else self.pieces[:0]


def plan_training(
    corpus: TokenizedCorpus,
    row_length: int,
    rows: int | None = None,
    epochs: float = 1.0,
    temperature: float | Sequence[float] = 1.0,
    max_repeats: float | None = None,
    packing: bool = True,
    group_size: int = 1,
    seed: int = 0,
) -> TrainingPlan:
    """Plan a training run: draw pieces by language, and put them into rows.

    Args:
        corpus: Tokenised corpus; held-out pieces are left out.
        row_length: Tokens of a row.
        rows: Rows to plan; `None` plans `epochs` times the tokens of the corpus.
        epochs: Passes over the corpus, when `rows` is not given.
        temperature: Language sampling, 1 as in the corpus and 0 all equal; two values move linearly from the first to
            the second over the run (annealed language sampling as in mmBERT, arXiv 2509.06888).
        max_repeats: Passes over one language at most; repeated more often than about 4 times, text teaches little
            more (arXiv 2305.16264). Lifted if the corpus is too small for the run otherwise. `None` is no limit.
        packing: Put several pieces into a row (first-fit, longest first). Otherwise each row is a piece, and rows of
            similar length stand together in groups of `group_size`, so that a batch has little padding.
        group_size: Rows of a whole batch, over all processes and accumulation.
        seed: Of all draws.

    Raises:
        ValueError: If nothing is left to train on, or an argument is out of its range.
    """
    training = np.flatnonzero(~corpus.held_out)
    if not len(training):
        raise ValueError("No text to train on: every document is held out. Lower the held-out share.")
    if rows is not None and rows < 1:
        raise ValueError(f"`rows` must be at least 1, got {rows}.")
    bounds = [float(t) for t in (temperature if isinstance(temperature, Sequence) else [temperature])]
    if not 1 <= len(bounds) <= 2 or min(bounds) < 0:
        raise ValueError(f"`temperature` must be one or two numbers of at least 0, got {temperature}.")
    lengths = corpus.lengths
    streams, sizes = [], []
    for language in range(len(corpus.language_names)):
        own = training[corpus.languages[training] == language]
        sizes.append(float(lengths[own].sum()))
        streams.append(_LanguageStream(own, lengths[own], (seed, language)) if len(own) else None)
    in_corpus = sum(sizes)
    # A row holds at least one piece and never more than its length: this many tokens always fill the rows.
    total = epochs * in_corpus if rows is None else float(rows) * (row_length if packing else lengths[training].mean())
    room = np.full(len(sizes), np.inf) if max_repeats is None else max_repeats * np.array(sizes)
    if room.sum() < total:
        room = np.full(len(sizes), np.inf)
    planned: list[np.ndarray] = []
    per_segment = _ROWS_PER_SEGMENT * (row_length if packing else float(lengths[training].mean()))
    if not packing:
        per_segment *= max(1.0, 8.0 * group_size / _ROWS_PER_SEGMENT)
    done = 0.0
    segment = 0
    while (done < total - 1e-6) if rows is None else (len(planned) < rows):
        progress = min((done + per_segment / 2) / total, 1.0)
        wanted = min(per_segment, total - done) if rows is None else per_segment
        shares = temperature_shares(sizes, bounds[0] + (bounds[-1] - bounds[0]) * progress, room, wanted)
        if not shares.sum() > 0:
            room = np.full(len(sizes), np.inf)
            continue
        drawn = [s.take(share) for s, share in zip(streams, shares, strict=True) if s is not None and share > 0]
        room = np.maximum(room - shares, 0.0)
        pieces = np.concatenate(drawn)
        rng = np.random.default_rng([seed, 1 << 20, segment])
        pieces = pieces[rng.permutation(len(pieces))]
        if packing:
            made = [pieces[items] for items in first_fit(lengths[pieces], row_length)]
            planned += [made[i] for i in rng.permutation(len(made))]
        else:
            pieces = pieces[np.argsort(lengths[pieces], kind="stable")]
            groups = [pieces[i : i + group_size] for i in range(0, len(pieces), group_size)]
            # A group that is not full would shift the batches after it.
            rest = groups.pop() if len(groups) > 1 and len(groups[-1]) < group_size else None
            ordered = [groups[i] for i in rng.permutation(len(groups))]
            if rest is not None and (rows is None and done + wanted >= total - 1e-6):
                ordered.append(rest)
            planned += [piece[None] for group in ordered for piece in group]
        done += wanted
        segment += 1
    planned = planned if rows is None else planned[:rows]
    starts = np.concatenate(([0], np.cumsum([len(row) for row in planned]))).astype(np.int64)
    return TrainingPlan(np.concatenate(planned).astype(np.int64), starts)


def plan_evaluation(corpus: TokenizedCorpus, row_length: int, max_rows: int | None = None) -> TrainingPlan | None:
    """Put held-out pieces into rows of similar length, each once; `None` if there are none.

    Args:
        corpus: Tokenised corpus.
        row_length: Tokens of a row.
        max_rows: Rows at most, spread evenly over the held-out pieces.
    """
    pieces = np.flatnonzero(corpus.held_out)
    if not len(pieces):
        return None
    made = first_fit(corpus.lengths[pieces], row_length)
    if max_rows is not None and len(made) > max_rows:
        made = [made[i] for i in np.linspace(0, len(made) - 1, max_rows).astype(int)]
    rows = [pieces[items] for items in made]
    return TrainingPlan(
        np.concatenate(rows).astype(np.int64),
        np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64),
    )


class PlannedRows(Dataset):
    """Rows of a plan as a dataset: each has its documents and its place in the run."""

    def __init__(self, corpus: TokenizedCorpus, plan: TrainingPlan):
        self.corpus, self.plan = corpus, plan

    def __len__(self) -> int:
        return len(self.plan)

    def fingerprint(self) -> str:
        """Return the plan's hash."""
        return self.plan.fingerprint()

    def __getitem__(self, row: int) -> dict:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict]:
        """Return several rows from one read of the corpus."""
        members = [self.plan[row] for row in rows]
        documents = iter(self.corpus.documents(np.concatenate(members)))
        return [
            {"documents": [next(documents) for _ in member], "index": row}
            for row, member in zip(rows, members, strict=True)
        ]


__all__ = [
    "PlannedRows",
    "TrainingPlan",
    "first_fit",
    "plan_evaluation",
    "plan_training",
    "temperature_shares",
]
