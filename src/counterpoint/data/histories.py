"""The contract of histories and sets of items: the form that every source for the task `sequences` returns (numpy, no torch).

Items have the numbers 0 to I - 1. A history is a user's items in order of time, a set is a bundle such as a playlist. A split for
training has whole histories or sets. A split for evaluation has questions: the known items, and the items to find.

    train      known: whole histories or sets         wanted: empty
    valid      known: a part                          wanted: the items to find, at least one
    test       known: a part                          wanted: the items to find, at least one

`leave_one_out` makes the splits of histories: the last item of each is for test, the one before for valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import Indices
from counterpoint.errors import DataError
from counterpoint.words import counted

SHORTEST = 3  # items of a history that has a question for valid and for test, and one item for training


class Lists:
    """Lists of item numbers of various lengths in one array, of which any number can be taken at once.

    Args:
        values: all numbers, list after list.
        lengths: [n] number of values of each list.

    Raises DataError where the lengths do not sum to the number of values.

    >>> Lists.of([[3, 1], [], [2]])[2].tolist()
    [2]
    """

    def __init__(self, values: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self.values, self.lengths = np.asarray(values, np.int64), np.asarray(lengths, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        if self.starts[-1] != len(self.values) or (len(self.lengths) and self.lengths.min() < 0):
            raise DataError(f"lengths sum to {self.starts[-1]}, but there are {counted(len(self.values), 'value')}")

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | NDArray[np.int64]]) -> Lists:
        """Make them from a list of lists."""
        rows = [np.asarray(row, np.int64) for row in lists]
        return cls(np.concatenate([np.zeros(0, np.int64), *rows]), np.array([len(row) for row in rows], np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, n: int) -> NDArray[np.int64]:
        """Return one list."""
        return self.values[self.starts[n] : self.starts[n + 1]]

    def take(self, rows: Indices) -> Lists:
        """Return the lists at these positions."""
        return Lists.of([self[int(n)] for n in rows])

    def padded(self, rows: Indices, fill: int) -> NDArray[np.int64]:
        """Return the lists at these positions as one array [n, longest], filled on the right."""
        lengths = self.lengths[rows]
        found = np.full((len(rows), int(lengths.max(initial=0))), fill, np.int64)
        here = np.arange(found.shape[1]) < lengths[:, None]
        at = self.starts[:-1][rows][:, None] + np.arange(found.shape[1])
        found[here] = self.values[at[here]]
        return found


@dataclass(frozen=True)
class HistorySplit:
    """Histories or sets. Positions are stable: the same number is the same history in every process and run."""

    known: Lists
    wanted: Lists
    names: Sequence[str] = ()  # of users or sets, for a reader

    def __len__(self) -> int:
        return len(self.known)


@dataclass(frozen=True)
class HistoryData:
    """A source's three splits, and the facts needed to read them.

    Raises DataError for item numbers out of range, an empty question, and features of another number of items.
    """

    name: str
    items: Sequence[str]  # names of the items
    train: HistorySplit
    valid: HistorySplit  # to monitor training and to choose settings
    test: HistorySplit  # evaluated once, at the end
    ordered: bool = True  # histories in time; False: sets
    features: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # of items, [I, width] each
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("train", "valid", "test"):
            split: HistorySplit = getattr(self, name)
            for lists in (split.known, split.wanted):
                if len(lists.values) and not 0 <= lists.values.min() <= lists.values.max() < len(self.items):
                    raise DataError(
                        f"{self.name}: item numbers of {name} must lie in 0..{len(self.items) - 1}, found "
                        f"{lists.values.min()}..{lists.values.max()}"
                    )
            if name != "train" and len(split) and not split.wanted.lengths.all():
                raise DataError(f"{self.name}: {name} has a question without an item to find; leave it out")
        for name, rows in self.features.items():
            if rows.ndim != 2 or len(rows) != len(self.items):
                raise DataError(
                    f"{self.name}: the features '{name}' have shape {list(rows.shape)}, expected [{len(self.items)}, width]: a row "
                    "for each item"
                )

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """[I] number of times that each item occurs in training."""
        return np.bincount(self.train.known.values, minlength=len(self.items))

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        return {
            "items": len(self.items),
            "examples": len(self.train),
            "ordered": self.ordered,
            "longest": int(self.train.known.lengths.max(initial=0)),
            "features": {name: rows.shape[1] for name, rows in self.features.items()},
        }


def leave_one_out(
    name: str, histories: Lists, items: Sequence[str], users: Sequence[str] = (), notes: Sequence[str] = ()
) -> HistoryData:
    """Split histories: the last item of each is for test, the one before for valid, the rest for training.

    Args:
        name: name of the data.
        histories: of each user the items in order of time. Those of fewer than 3 items are for training alone.
        items: names of the items.
        users: names of the users. Default: none.
        notes: remarks for the reader. Default: none.

    Raises DataError where no history has 3 items.
    """
    long = np.flatnonzero(histories.lengths >= SHORTEST).tolist()
    if not long:
        raise DataError(
            f"{name}: none of {counted(len(histories), 'history')} has {SHORTEST} items: one to learn from, one for the valid "
            "split and one "
            "for the test split"
        )
    said = list(notes)
    if len(long) < len(histories):
        said.append(
            f"{name}: {len(histories) - len(long)} of {counted(len(histories), 'history has', 'histories have')} fewer than "
            f"{SHORTEST} items and are for "
            "training alone"
        )

    def question(before: int) -> HistorySplit:
        return HistorySplit(
            Lists.of([histories[n][: len(histories[n]) - before] for n in long]),
            Lists.of([histories[n][len(histories[n]) - before :][:1] for n in long]),
            [users[n] for n in long] if len(users) else (),
        )

    asked = np.isin(np.arange(len(histories)), long)
    learnt = [histories[n][:-2] if asked[n] else histories[n] for n in range(len(histories))]
    train = HistorySplit(Lists.of(learnt), Lists.of([[]] * len(learnt)), users)
    return HistoryData(name, items, train, question(2), question(1), notes=said)
