"""Cells of feature maps of two crops of one picture: their places in the picture, and the cells that lie near each other.

A crop's coordinates are (left, top, right, bottom) in the picture, in shares of its width and height. A flipped crop has its
left and right exchanged. Cell (a, b) of a map of H x W cells has the centre

    x = left + (b + 1/2) (right - left) / W,      y = top + (a + 1/2) (bottom - top) / H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.precision import wide as widened
from counterpoint.core.transforms import traced


class CellPairs(NamedTuple):
    """Pairs of near cells of n pictures with H x W = T cells each, sorted by the first cell."""

    second: Int[Tensor, " pairs"]  # picture * T + cell of crop 2
    starts: Int[Tensor, " cells"]  # of every cell of crop 1, its first pair
    counts: Int[Tensor, " n"]  # number of pairs of each picture

    @property
    def first(self) -> Int[Tensor, " pairs"]:
        """Return of each pair picture * T + cell of crop 1."""
        per_cell = self.starts.diff(append=self.starts.new_tensor([len(self.second)]))
        return torch.repeat_interleave(torch.arange(len(per_cell), device=per_cell.device), per_cell)


FEW = 2**25  # similarities up to which their whole matrix is faster than the kernel, picture by picture
HELD = 2**17  # pairs of near rows with near columns that are compared at a time
Numbers = NDArray[np.signedinteger[Any]]
Some = TypeVar("Some", Tensor, NDArray[Any])  # the same operators on both


def _squares(coords: Some, places: Sequence[Some]) -> tuple[Some, Some, Some]:
    """Return squared distances of rows [H, H, n] and of columns [W, W, n], and the squared diagonals [2 n].

    Args:
        coords: coordinates of the first crops, then of the second ones, [4, 2 n]. With the pictures last this is fast.
        places: centres of rows and of columns in cells, [H, 1] and [W, 1].
    """
    (down, across), n = places, coords.shape[1] // 2
    high, wide = (coords[3] - coords[1]) / len(down), (coords[2] - coords[0]) / len(across)
    y, x = coords[1] + down * high, coords[0] + across * wide
    gaps = y[:, None, :n] - y[None, :, n:], x[:, None, :n] - x[None, :, n:]
    return gaps[0] * gaps[0], gaps[1] * gaps[1], high * high + wide * wide


def near_cells(
    coords_1: Float[Tensor, "n 4"], coords_2: Float[Tensor, "n 4"], shape: tuple[int, int], reach: float
) -> CellPairs:
    """List the pairs of cells of two crops whose centres are closer than `reach` diagonals of the larger cell.

    Distances are those of PixPro (arXiv 2011.10043, Sec. 3.1): in shares of the picture's sides, divided by the larger of the
    two crops' cell diagonals. Time and memory are linear in the pairs.

    Args:
        coords_1, coords_2: coordinates of the crops, see the module.
        shape: rows and columns of both maps.
        reach: > 0, in diagonals; PixPro's threshold is 0.7.

    >>> whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> near_cells(whole, whole, (2, 2), 0.7).second
    tensor([0, 1, 2, 3])
    """
    one, two = widened(coords_1.detach()), widened(coords_2.detach())
    if not one.is_cpu or traced():
        return _of_axes(one, two, shape, reach)
    pairs = _listed(one.numpy(), two.numpy(), shape, reach)
    return _grouped([pairs], len(one), shape[0] * shape[1])[0]


def near_cells_both_ways(
    coords_1: Float[Tensor, "n 4"], coords_2: Float[Tensor, "n 4"], shape: tuple[int, int], reach: float
) -> tuple[CellPairs, CellPairs]:
    """List the pairs of near cells from crop 1 to crop 2, and from crop 2 to crop 1.

    Args: as in `near_cells`.
    """
    one, two = widened(coords_1.detach()), widened(coords_2.detach())
    if not one.is_cpu or traced():
        return _of_axes(one, two, shape, reach), _of_axes(two, one, shape, reach)
    first, second = _listed(one.numpy(), two.numpy(), shape, reach)
    there, back = _grouped([(first, second), (second, first)], len(one), shape[0] * shape[1])
    return there, back


def _listed(one: NDArray[Any], two: NDArray[Any], shape: tuple[int, int], reach: float) -> tuple[Numbers, Numbers]:
    """Find the pairs of near cells: their cells of crop 1, and their cells of crop 2.

    A near pair of rows meets every near pair of columns of its picture; kept is what is near in both together. The pairs of
    a cell have the order of the other cells. NumPy needs half of torch's time for lists of this length.
    """
    centres = [np.arange(0.5, cells, dtype=one.dtype)[:, None] for cells in shape]
    (high, wide), n = shape, len(one)
    down, across, diagonals = _squares(np.ascontiguousarray(np.concatenate((one, two)).T), centres)
    limit = one.dtype.type(reach**2) * np.maximum(diagonals[:n], diagonals[n:])
    near = (down < limit).transpose(2, 0, 1)
    down, left = (np.ascontiguousarray(x.transpose(2, 0, 1)) for x in (down, limit - across))  # left for the rows
    # Entries of near rows are (picture, a, a'), those of near columns are (picture, b, b').
    rows, columns = np.flatnonzero(near), np.flatnonzero(left > 0)
    down, left = down.ravel().take(rows), left.ravel().take(columns)
    line, other = rows // high, columns // wide
    picture, owner = line // high, other // wide
    each = np.bincount(owner, minlength=n)
    number = each.take(picture)  # columns that each entry of rows meets
    stops = number.cumsum()
    shift = (each.cumsum() - each).take(picture) - (stops - number)
    # The matrix of all pairs is [picture, a, b, a', b']. A place in it is a number of the rows plus one of the columns.
    kind = np.int32 if n * (high * wide) ** 2 < 2**31 else np.int64
    row = ((line * high * wide + rows - line * high) * wide).astype(kind)
    column = ((other - owner * wide) * high * wide + columns - other * wide).astype(kind)
    found = []
    start = begun = 0
    while start < len(rows):
        stop = max(start + 1, int(stops.searchsorted(begun + HELD, "right")))
        part, ended = slice(start, stop), int(stops[stop - 1])
        times = number[part]
        at: NDArray[np.int64] = np.repeat(shift[part], times)
        at += np.arange(begun, ended)
        near = np.flatnonzero(np.repeat(down[part], times) < left.take(at))
        place = np.repeat(row[part], times)
        place += column.take(at)
        found.append(place.take(near))
        start, begun = stop, ended
    places = found[0] if len(found) == 1 else np.concatenate([np.empty(0, kind), *found])
    first: Numbers = places // kind(high * wide)
    places += (first // kind(high * wide) - first) * kind(high * wide)
    return first, places


def _grouped(ways: Sequence[tuple[Numbers, Numbers]], n: int, cells: int) -> list[CellPairs]:
    """Sort pairs by their first cells, in each way. Time is linear: they become the entries of a matrix of one row, column
    by column."""
    from scipy.sparse import csr_matrix

    pairs, total = len(ways[0][0]), n * cells
    keys = np.concatenate([first + first.dtype.type(way * total) for way, (first, _) in enumerate(ways)])
    values = np.concatenate([second for _, second in ways])
    columns = csr_matrix((values, keys, np.array([0, len(keys)], keys.dtype)), shape=(1, len(ways) * total)).tocsc()
    values, indptr = columns.data.astype(np.int64), columns.indptr.astype(np.int64)
    found = []
    for way in range(len(ways)):
        starts = indptr[way * total : (way + 1) * total + 1]
        if way:
            starts = starts - way * pairs
        parts = values[way * pairs : (way + 1) * pairs], starts[:-1], starts[cells::cells] - starts[:-1:cells]
        found.append(CellPairs(*(torch.from_numpy(part) for part in parts)))
    return found


def _of_axes(one: Tensor, two: Tensor, shape: tuple[int, int], reach: float) -> CellPairs:
    """Find the pairs of near cells from near rows and near columns, by operations of torch alone."""
    places = [torch.arange(cells, dtype=one.dtype, device=one.device)[:, None] + 0.5 for cells in shape]
    (high, wide), n = shape, len(one)
    down, across, diagonals = _squares(torch.cat((one, two)).T, places)
    limit = reach**2 * torch.maximum(diagonals[:n], diagonals[n:])
    down, across = (square.permute(2, 0, 1).contiguous() for square in (down, across))
    # Near rows of a row follow each other, and so do near columns: a beginning and a number for each.
    near_rows, near_columns = (square < limit[:, None, None] for square in (down, across))
    top, left = (near.to(torch.uint8).argmax(2).flatten() for near in (near_rows, near_columns))
    tall, broad = near_rows.sum(2), near_columns.sum(2)
    most = (tall[:, :, None] * broad[:, None, :]).flatten()  # candidates of each cell of crop 1
    cell = torch.repeat_interleave(torch.arange(len(most), device=most.device), most)
    place = torch.arange(len(cell), device=cell.device) - (most.cumsum(0) - most)[cell]
    row, column = cell // wide, cell // (high * wide) * wide + cell % wide  # of the flattened axes of all pictures
    width = broad.flatten()[column]
    other_row, other_column = top[row] + place // width, left[column] + place % width
    distance = down.flatten()[row * high + other_row] + across.flatten()[column * wide + other_column]
    picture = cell // (high * wide)
    kept = distance < limit[picture]
    per_cell = torch.bincount(cell[kept], minlength=len(most))
    second = ((picture * high + other_row) * wide + other_column)[kept]
    return CellPairs(second, per_cell.cumsum(0) - per_cell, per_cell.view(n, -1).sum(1))


def near_sums(pairs: CellPairs, values: Float[Tensor, "cells dim"]) -> Float[Tensor, "cells dim"]:
    """Sum, for every cell of crop 1, the values of its near cells of crop 2; zeros where there is none. No gradient.

    Args:
        pairs: the near cells.
        values: a row for each cell of crop 2 of all pictures.
    """
    with torch.no_grad():
        return F.embedding_bag(pairs.second, values, pairs.starts, mode="sum")


def cell_rows(maps: Float[Tensor, "n dim rows columns"]) -> Float[Tensor, "n cells dim"]:
    """Return a map's vectors, cell by cell, row by row."""
    return maps.flatten(2).transpose(1, 2)


def near_contrast(
    query: Float[Tensor, "n cells dim"], key: Float[Tensor, "n cells dim"], pairs: CellPairs
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Contrast each cell with all cells of the other crop; return its loss, and whether it has a near cell.

    The loss is log(sum over all cells of e^s) - log(sum over near cells of e^s).

    Args:
        query: cells of the first crops, divided by the temperature.
        key: cells of the second crops of the same pictures.
        pairs: near cells.

    s is the product of query and key of one picture. A cell without a near cell has 0. Large maps use the kernel: their memory is
    linear in the cells and in the pairs.
    """
    n, cells = query.shape[:2]
    first, second = pairs.first, pairs.second
    if n * cells**2 > FEW:
        return _by_kernel(query, key, first, second)
    s = query @ key.transpose(1, 2)
    listed = s.flatten()[first * cells + second % cells]
    # The logarithm of a cell's sum of exponentials over its near cells, relative to the largest of them.
    most = listed.new_full((len(pairs.starts),), -torch.inf)
    most = most.scatter_reduce(0, first, listed.detach(), "amax")
    has = ~(most == -torch.inf)  # NaN passes
    most = torch.where(has, most, 0.0)
    own = torch.zeros_like(most).index_add(0, first, (listed - most[first]).exp())
    return torch.where(has, s.logsumexp(2).flatten() - most - torch.where(has, own, 1.0).log(), 0.0), has


def _by_kernel(query: Tensor, key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `near_contrast` picture by picture, without a matrix of similarities."""
    n, cells = query.shape[:2]
    has = torch.zeros(n * cells, dtype=torch.bool, device=query.device).index_fill(0, first, True)
    ends = torch.searchsorted(first, torch.arange(n + 1, device=first.device) * cells).tolist()
    rows = []
    for b in range(n):
        part = slice(ends[b], ends[b + 1])

        def near(r: slice, c: slice, at: slice = part) -> Tensor:
            """Mark the near pairs of a tile."""
            down, across = first[at] % cells - r.start, second[at] % cells - c.start
            there = (down >= 0) & (down < r.stop - r.start) & (across >= 0) & (across < c.stop - c.start)
            found = query.new_zeros(r.stop - r.start, c.stop - c.start)
            found[down[there], across[there]] = 1
            return found

        every = pair_logsumexp(query[b], key[b], keep=0).rows
        own = pair_logsumexp(query[b], key[b], weight=near, keep=0).rows
        mine = has[b * cells : (b + 1) * cells]
        rows.append(torch.where(mine, every - torch.where(mine, own, 0.0), 0.0))
    return torch.cat(rows), has
