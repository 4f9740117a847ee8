"""Rehearse: choose a few items of each learned class, and mix them into the batches of new items."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.engine.loading import Batches
from counterpoint.errors import CounterpointError

Rows = NDArray[np.int64]


def herded(features: Float[Tensor, "n dim"], count: int) -> Int[Tensor, " count"]:
    """Choose rows by herding: one by one, so that their mean stays near the mean of all (iCaRL).

    Args:
        features: rows of one class.
        count: number of rows to choose, at least 0; all rows if there are fewer.

    Of equally good rows the first is chosen. No row is chosen twice.

    >>> herded(torch.tensor([[0.0], [4.0], [2.1]]), 1)
    tensor([2])
    """
    rows, left = features.detach().double(), torch.ones(len(features), dtype=torch.bool)
    mean, total = rows.mean(0), torch.zeros(rows.shape[1], dtype=torch.float64)
    chosen = list[int]()
    for number in range(1, min(count, len(rows)) + 1):
        away = (mean - (total + rows) / number).square().sum(1)
        best = int(away.masked_fill(~left, torch.inf).argmin())
        left[best] = False
        total = total + rows[best]
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64)


def exemplars(memory: float, items: int) -> int:
    """Return the number of items that a class keeps: a share of its items below 1, else a number. 0 keeps none.

    >>> exemplars(0.01, 250), exemplars(4, 250)
    (2, 4)
    """
    return min(items, int(memory) if memory >= 1 or not memory else max(1, int(memory * items)))


class RehearsalBatches(Batches):
    """Batches of new items, each with some kept ones; the kept ones take turns over the batches.

    A batch has an item at most once: of two equal rows one would be a negative of the other. So a batch has fewer kept items
    than `share` asks for where the memory has fewer. An epoch leaves out new items that do not fill a batch, unless
    these are all.

    Args:
        new: positions of the new items, at least one.
        kept: positions of the kept ones, possibly none; disjoint from `new`.
        batch_size: number of items in a batch, at least 2.
        share: share of the kept items in a batch, between 0 and 1.
    """

    def __init__(self, new: Rows, kept: Rows, batch_size: int, share: float) -> None:
        self.new, self.kept = new, kept
        self.old = min(len(kept), batch_size - 1, max(1, round(share * batch_size)))
        self.fresh = min(len(new), batch_size - self.old)
        self.steps = len(new) // self.fresh
        super().__init__(self.steps * (self.fresh + self.old), self.fresh + self.old)

    def epoch(self, generator: np.random.Generator) -> Iterator[Rows]:
        order = generator.permutation(self.new)
        queue = np.empty(0, np.int64)
        for start in range(0, self.steps * self.fresh, self.fresh):
            if len(queue) < self.old:
                # The rest of a turn goes first, then a new turn without it, so that no item comes twice.
                turn = generator.permutation(self.kept)
                queue = np.concatenate([queue, turn[~np.isin(turn, queue)], turn[np.isin(turn, queue)]])
            batch, queue = np.concatenate([order[start : start + self.fresh], queue[: self.old]]), queue[self.old :]
            # Kept items are spread over the processes.
            yield generator.permutation(batch)


def need_memory(memory: float, share: float, selection: str) -> None:
    """Raise CounterpointError for settings of a memory that do not fit."""
    if not 0 <= memory < float("inf") or (memory > 1 and memory != int(memory)):
        raise CounterpointError(f"memory must be a share below 1 or a whole number of items, got {memory}")
    if not 0 < share < 1:
        raise CounterpointError(f"rehearsal_share must lie between 0 and 1, got {share}")
    if selection not in ("herding", "random"):
        raise CounterpointError(f"selection must be herding or random, got '{selection}'")
