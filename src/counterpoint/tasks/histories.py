"""Batches of histories and of sets of items, for the task `sequences`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from counterpoint.data.histories import HistoryData, HistorySplit
from counterpoint.data.images import Indices
from counterpoint.engine.loading import Batches

BETWEEN = " · "  # titles have commas themselves


class Beginnings:
    """The training examples of histories: every beginning of at least one item, with the item after it.

    Args:
        split: the training histories. Those of one item have no example.
    """

    def __init__(self, split: HistorySplit) -> None:
        self.lists = split.known
        self.counts = np.maximum(self.lists.lengths - 1, 0)
        self.firsts = np.concatenate([[0], np.cumsum(self.counts)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """[examples] the item after each beginning."""
        ends = np.ones(len(self.lists.values), bool)
        ends[self.lists.starts[:-1][self.lists.lengths > 0]] = False
        return self.lists.values[ends]

    def at(self, examples: Indices, length: int) -> dict[str, Tensor]:
        """Return the examples at these positions: ids, lengths and target (see the module).

        Args:
            examples: positions.
            length: largest number of items of a beginning; earlier ones are left out.
        """
        examples = np.asarray(examples, np.int64)
        user = np.searchsorted(self.firsts, examples, side="right") - 1
        many = examples - self.firsts[user] + 1  # items of the beginning
        start, kept = self.lists.starts[user], np.minimum(many, length)
        places = np.arange(int(kept.max(initial=1)))
        found = (start + many - kept)[:, None] + places
        inside = places < kept[:, None]
        ids = np.where(inside, self.lists.values[np.minimum(found, len(self.lists.values) - 1)] + 1, 0)
        target = self.lists.values[start + many]
        return {name: torch.from_numpy(value) for name, value in (("ids", ids), ("lengths", kept), ("target", target))}


class SameTarget:
    """Training examples by their next item, to find another history with the same one.

    Args:
        beginnings: all examples.
    """

    def __init__(self, beginnings: Beginnings) -> None:
        self.beginnings = beginnings
        self.by_target = beginnings.targets.argsort(kind="stable")
        self.targets = beginnings.targets[self.by_target]
        self.order = self.by_target.argsort()  # place of each example in `by_target`

    def other(
        self, target: NDArray[np.int64], own: NDArray[np.int64], drawn: Float[NDArray[np.float32], " n"], length: int
    ) -> dict[str, Tensor]:
        """Return another example with the same next item for each, or the same one where there is no other.

        Args:
            target: [n] next items.
            own: [n] positions of the examples.
            drawn: [n] uniform numbers in 0..1, which choose.
            length: largest number of items (see `Beginnings.at`).
        """
        first, last = (np.searchsorted(self.targets, target, side) for side in ("left", "right"))
        chosen = first + (drawn * np.maximum(last - first - 1, 1)).astype(np.int64)
        chosen = np.where(last - first > 1, chosen + (chosen >= self.order[own]), chosen)
        return self.beginnings.at(self.by_target[chosen], length)


class UserBatches(Batches):
    """Batches in which every user has one random beginning an epoch.

    Args:
        beginnings: all examples.
        batch_size: number of examples in a batch, over all processes.
    """

    def __init__(self, beginnings: Beginnings, batch_size: int) -> None:
        self.users = np.flatnonzero(beginnings.counts)
        self.beginnings = beginnings
        super().__init__(len(self.users), batch_size)

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        users = generator.permutation(self.users)
        return self.beginnings.firsts[users] + generator.integers(0, self.beginnings.counts[users])


class Examples(Dataset[dict[str, Any]]):
    """Batches of training examples by lists of positions."""

    def __init__(self, data: HistoryData, beginnings: Beginnings, length: int) -> None:
        self.data, self.beginnings, self.length = data, beginnings, length

    def __len__(self) -> int:
        return len(self.beginnings) if self.data.ordered else len(self.data.train)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        rows = np.asarray(list(positions), np.int64)
        if self.data.ordered:
            return self.beginnings.at(rows, self.length) | {"index": torch.from_numpy(rows)}
        return known_items(self.data.train, rows, self.length, ordered=False) | {"index": torch.from_numpy(rows)}


def known_items(split: HistorySplit, rows: Indices, length: int, *, ordered: bool) -> dict[str, Tensor]:
    """Return the known items of these rows as a network reads them: ids [n, L] with 0 for padding, and lengths [n].

    Args:
        split: histories or sets.
        rows: positions.
        length: largest number of items (see `items_read`).
        ordered: the split has histories.
    """
    kept = [items_read(split.known[int(n)], length, ordered=ordered) for n in rows]
    lengths = torch.tensor([len(items) for items in kept], dtype=torch.int64)
    return {"ids": ids_of(kept), "lengths": lengths}


def items_read(items: NDArray[np.int64], length: int, *, ordered: bool) -> NDArray[np.int64]:
    """Return the item numbers that a network reads: the last ones of a history, the first ones of a set."""
    return items[-length:] if ordered else items[:length]


def ids_of(lists: Sequence[NDArray[np.int64]]) -> Tensor:
    """Return lists of item numbers as ids [n, longest]: numbers plus 1, padded with 0 on the right."""
    ids = np.zeros((len(lists), max(map(len, lists), default=0) or 1), np.int64)
    for row, items in enumerate(lists):
        ids[row, : len(items)] = items + 1
    return torch.from_numpy(ids)
