"""Batches whose in-batch negatives are harder: documents that begin alike come together, and no text comes twice."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler


class NeighbourBatchSampler(DefaultBatchSampler):
    """Draw runs of documents that stand next to one another in alphabetical order, many runs to a batch.

    Listings come in families (a program, its documentation, its plug-ins) whose texts begin alike. Drawn at random
    from a large collection, members of a family hardly ever meet in a batch. Meeting makes harder negatives without
    mining; where texts are cut before they differ, it makes wrong ones, and in a short run it did not help
    (docs/retrieval.md). With `neighbours=1` it does what sentence-transformers' `NoDuplicatesBatchSampler` is for.

    Args:
        dataset: With a column `document`.
        batch_size: Rows of a batch.
        drop_last: Whether to leave out a last batch that is not full.
        neighbours: Rows of a run.
        **kwargs: As in the library: `valid_label_columns`, `generator`, `seed`.

    Raises:
        ValueError: If a batch cannot hold a run.
    """

    def __init__(self, dataset: Any, batch_size: int, drop_last: bool, neighbours: int = 4, **kwargs):
        super().__init__(dataset, batch_size=batch_size, drop_last=drop_last, **kwargs)
        if not 1 <= neighbours <= batch_size:
            raise ValueError(f"neighbours={neighbours} must be within 1 and the batch's {batch_size} rows.")
        self.neighbours = neighbours
        self._planned: tuple[tuple[int, int], list[list[int]]] | None = None
        # The library writes the name of the dataset into every row; it and labels may repeat.
        left_out = {"dataset_name", *(self.valid_label_columns or [])}
        columns = [name for name in dataset.column_names if name not in left_out]
        self.rows = [tuple(row[name] for name in columns) for row in dataset]
        self.order = sorted(range(len(self.rows)), key=list(dataset["document"]).__getitem__)

    def __len__(self) -> int:
        return len(self._plan())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._plan())

    def _plan(self) -> list[list[int]]:
        """Return the batches of this epoch; how many there are depends on which texts are equal."""
        key = (self.seed, self.epoch)
        if self._planned is not None and self._planned[0] == key:
            return self._planned[1]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        # Runs begin at another place in every epoch, so that the same rows are not always apart.
        shift = int(torch.randint(self.neighbours, (1,), generator=generator))
        starts = range(-shift, len(self.order), self.neighbours)
        runs = [self.order[max(start, 0) : start + self.neighbours] for start in starts]
        mixed = torch.randperm(len(runs), generator=generator).tolist()
        waiting = deque(row for index in mixed for row in runs[index])
        batches = []
        while waiting:
            batch: list[int] = []
            seen: set[Any] = set()
            later: list[int] = []
            while waiting and len(batch) < self.batch_size:
                row = waiting.popleft()
                if seen.isdisjoint(self.rows[row]):
                    batch.append(row)
                    seen.update(self.rows[row])
                else:
                    later.append(row)
            waiting.extendleft(reversed(later))
            if len(batch) == self.batch_size or not self.drop_last:
                batches.append(batch)
        self._planned = (key, batches)
        return batches


__all__ = ["NeighbourBatchSampler"]
