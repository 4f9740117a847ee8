"""The excluded pairs of a tile, and the targets of its pairs, for the kernel.

A rule excludes pairs from the sums over a row or a column:

    Diagonal   at fixed distances from the diagonal: a row's own key, its other view
    Views      a row itself and its other view, in a batch of both views
    Labels     columns of the row's own label, or of any other label
    Listed     columns listed for each row
    Where      wherever a function returns True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

# A function of a tile's rows and columns in the whole matrix; it returns a number for each pair.
Block = Callable[[slice, slice], Tensor]


@runtime_checkable
class Rule(Protocol):
    """A rule that masks pairs out of the denominator, one tile at a time."""

    @property
    def symmetric(self) -> bool:
        """Whether (i, j) is excluded whenever (j, i) is."""
        ...

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        """Set the excluded entries of the tile at [rows, columns] of the whole matrix to -inf, in place."""
        ...


@dataclass(frozen=True)
class Diagonal:
    """Row i does not see column i + offset, for each offset: 0 is itself; n and -n the other view of a batch of pairs."""

    offsets: tuple[int, ...] = (0,)

    @property
    def symmetric(self) -> bool:
        return {-offset for offset in self.offsets} == set(self.offsets)

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        for offset in self.offsets:
            along = rows.start - columns.start + offset
            if -tile.shape[0] < along < tile.shape[1]:
                tile.diagonal(along).fill_(-math.inf)


@dataclass(frozen=True)
class Views:
    """Of a batch's first views and below them its second ones, a row sees neither itself nor its other view.

    pairs   how many rows there are of each view
    offset  the column of the first row
    """

    pairs: int
    offset: int = 0

    @property
    def symmetric(self) -> bool:
        return self.offset == 0

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        Diagonal((self.offset,)).exclude(tile, rows, columns)
        for first, other in ((0, self.pairs), (self.pairs, -self.pairs)):
            start, stop = max(rows.start, first), min(rows.stop, first + self.pairs)
            if start < stop:
                part = tile[start - rows.start : stop - rows.start]
                Diagonal((self.offset + other,)).exclude(part, slice(start, stop), columns)


@dataclass(frozen=True)
class Labels:
    """Row i does not see columns of its own label (`same=True`), or sees no others (`same=False`)."""

    rows: Int[Tensor, " rows"]
    columns: Int[Tensor, " columns"] | None = None  # None: the rows'
    same: bool = True

    @property
    def symmetric(self) -> bool:
        return self.columns is None

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        other = self.rows if self.columns is None else self.columns
        match = self.rows[rows][:, None] == other[columns]
        tile.masked_fill_(match if self.same else ~match, -math.inf)


@dataclass(frozen=True)
class Listed:
    """Row i does not see the columns index[i]; entries below 0 are padding."""

    index: Int[Tensor, "rows most"]
    symmetric = False

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        listed = self.index[rows]
        index = listed - columns.start
        outside = (listed < 0) | (index < 0) | (index >= tile.shape[1])
        values = tile.new_full(index.shape, -math.inf).masked_fill_(outside, math.inf)
        # The smaller of an entry and infinity is the entry.
        tile.scatter_reduce_(1, index.masked_fill(outside, 0), values, "amin")


@dataclass(frozen=True)
class Where:
    """Row i does not see column j where mask(rows, columns)[i, j] is True; the function is asked for one tile at a time."""

    mask: Callable[[slice, slice], Bool[Tensor, "rows columns"]]
    symmetric: bool = False  # say so if it is: then only half of the matrix is computed

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        tile.masked_fill_(self.mask(rows, columns), -math.inf)


@dataclass  # not frozen: torch.compile cannot follow the fields of a frozen one that it made itself
class Targets:
    """Soft targets with few entries to a row, for `pair_logsumexp_towards`: weight[i, k] at column index[i, k].

    Entries of one row that name the same column add up.

    offset  the row of the whole matrix at which these begin
    length  how many columns it has
    """

    index: Int[Tensor, "rows most"]
    weight: Float[Tensor, "rows most"]
    offset: int
    length: int

    def __call__(self, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        mine = slice(rows.start - self.offset, rows.stop - self.offset)
        at, weight = self.index[mine] - columns.start, self.weight[mine]
        width = columns.stop - columns.start
        if width < self.length:
            outside = (at < 0) | (at >= width)
            at, weight = at.masked_fill(outside, 0), weight.masked_fill(outside, 0.0)
        return weight.new_zeros(len(at), width).scatter_add_(1, at, weight)
