"""The rows that a contrastive step compares, in one form that an addition can mix, cut, weight or extend.

A base method (SimCLR, MoCo, SimSiam, CLIP) returns a `Compared`: the two sides of its pairs. Its `ways` turn the sides into a
list of directions. A direction has anchors, one positive for each anchor, a bank of rows to contrast them with, and rules.
The rules exclude rows of the bank for an anchor.

    ways        directions                                                         base methods
    views       one: both sides are anchors, the bank is both sides                SimCLR
    pairs       two: each side is contrasted with the other side                   CLIP
    Queued      one: the query is the anchor, the bank is a queue of older keys    MoCo
    predicted   two: each side is predicted from the other, the bank is empty      SimSiam
    by_view     none: no row is contrasted; each view is spread over prototypes    SwAV, MSN
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import gather_rows, place
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import exact
from counterpoint.core.rules import Diagonal, Rule, Views, Where

WHOLE = 2**22  # similarities of a direction that are held at once, with their gradient: 16 MiB in float32


@dataclass(frozen=True)
class Direction:
    """Anchors with one positive each, and a bank of rows to contrast them with.

    All are unit rows, not divided by a temperature; those of `predicted` are as they were given.
    """

    query: Float[Tensor, "m dim"]
    positive: Float[Tensor, "m dim"]
    bank: Float[Tensor, "keys dim"]  # of all processes
    exclude: tuple[Rule, ...]  # rules of [m, keys] with this process's anchors from 0
    index: Int[Tensor, " m"] | None  # positions in the training set

    def parts(self, rows: int = 512) -> Iterator[tuple[slice, Float[Tensor, "part keys"]]]:
        """Compute cosines with the bank, -inf where excluded, some anchors at a time; without gradient."""
        with torch.no_grad():
            for start in range(0, len(self.query), rows):
                part = slice(start, min(start + rows, len(self.query)))
                with exact(self.query.device.type):
                    s = self.query[part] @ self.bank.T
                for rule in self.exclude:
                    rule.exclude(s, part, slice(0, len(self.bank)))
                yield part, s

    def whole(self, temperature: float | Tensor) -> Float[Tensor, "m keys"] | None:
        """Compute all similarities with the bank and their gradient, -inf where excluded; None where they are too many to hold."""
        if len(self.query) * len(self.bank) > WHOLE:
            return None
        with exact(self.query.device.type):
            s = scaled(self.query, temperature) @ self.bank.T
        for rule in self.exclude:
            rule.exclude(s, slice(0, len(self.query)), slice(0, len(self.bank)))
        return s

    def positives(self, temperature: float | Tensor) -> Float[Tensor, " m"]:
        """Compute the similarity with the positive."""
        return positive_similarity(scaled(self.query, temperature), self.positive)

    def negatives(self, temperature: float | Tensor, *more: Rule) -> Float[Tensor, " m"]:
        """Compute the log of the summed exponentials of the similarities with the bank; `more` excludes more of it."""
        rules = (*self.exclude, *more)
        number = not isinstance(temperature, Tensor) or temperature.ndim == 0
        if self.bank is self.query and number and all(rule.symmetric for rule in rules):
            return pair_logsumexp(scaled(self.query, temperature**0.5), exclude=rules).rows
        return pair_logsumexp(scaled(self.query, temperature), self.bank, exclude=rules).rows


@dataclass(frozen=True)
class Compared:
    """The two sides of the pairs of a step, not normalised, and the ways in which they are contrasted.

    Args:
        query: rows of the first side.
        key: rows of the second side; without gradient where a momentum network made them.
        ways: `views`, `pairs`, a `Queued` or `predicted`; see the table at the top.
        temperature: > 0; default 1.
        index: positions of the pairs in the training set.
        targets: for `predicted`, the rows that stand for query and key as targets; default: query and key themselves.
    """

    query: Float[Tensor, "n dim"]
    key: Float[Tensor, "n dim"]
    ways: Ways
    temperature: float | Float[Tensor, ""] = 1.0
    index: Int[Tensor, " n"] | None = None
    targets: tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]] | None = None

    def directions(self, *, apart: bool = False) -> list[Direction]:
        """Return the directions of the comparison. A loss of them closes with `global_mean`: each process has its own anchors.

        Args:
            apart: leave an example's own older keys out of its bank, where a queue still holds them.
        """
        return self.ways(self, apart)


Ways = Callable[[Compared, bool], list[Direction]]


def views(compared: Compared, apart: bool = False) -> list[Direction]:
    """Contrast every row of both sides with all other rows of both sides."""
    query, key, index = unit(compared.query), unit(compared.key), compared.index
    n, rows = len(query), torch.cat([query, key])
    rule = Views(n, place(2 * n, rows.device).offset)
    both = None if index is None else torch.cat([index, index])
    return [Direction(rows, torch.cat([key, query]), gather_rows(rows), (rule,), both)]


def pairs(compared: Compared, apart: bool = False) -> list[Direction]:
    """Contrast every row of either side with the other rows of the other side."""
    query, key, index = unit(compared.query), unit(compared.key), compared.index
    rule = Diagonal((place(len(query), query.device).offset,))
    return [
        Direction(query, key, gather_rows(key), (rule,), index),
        Direction(key, query, gather_rows(query), (rule,), index),
    ]


@dataclass(frozen=True)
class Queued:
    """Contrast the query with its key against a queue of older keys."""

    queue: Float[Tensor, "keys dim"]  # unit rows
    owner: Int[Tensor, " keys"] | None = None  # position of the example each key belongs to, -1 for none

    def __call__(self, compared: Compared, apart: bool = False) -> list[Direction]:
        if not len(self.queue):
            raise ValueError("queue must hold at least one key")
        query, key, index, owner = unit(compared.query), unit(compared.key), compared.index, self.owner
        rules: tuple[Rule, ...] = ()
        if apart and index is not None and owner is not None:
            rules = (Where(lambda rows, columns: index[rows][:, None] == owner[columns]),)
        return [Direction(query, key.detach(), self.queue.detach().to(query.dtype), rules, index)]


def predicted(compared: Compared, apart: bool = False) -> list[Direction]:
    """Predict either side from the other, without negatives. Rows stay as they are: a predictor sees their length."""
    query, key, index = compared.query, compared.key, compared.index
    of_query, of_key = compared.targets or (query, key)
    return [Direction(query, of_key, key[:0], (), index), Direction(key, of_query, query[:0], (), index)]


def by_view(compared: Compared, apart: bool = False) -> list[Direction]:
    """Raise ValueError: methods whose terms over a batch cover one view at a time have no anchors and no bank."""
    raise ValueError("a method that spreads each view over prototypes contrasts no rows")
