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
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.core.precision import wide as widened
from counterpoint.core.transforms import traced


class CellPairs(NamedTuple):
    """Pairs of near cells of n pictures with H x W = T cells each, sorted by the first cell."""

    first: Int[Tensor, " pairs"]  # picture * T + cell of crop 1
    second: Int[Tensor, " pairs"]  # picture * T + cell of crop 2
    starts: Int[Tensor, " cells"]  # of every cell of crop 1, its first pair
    counts: Int[Tensor, " n"]  # number of pairs of each picture


FEW = 256  # cells of a map up to which the matrix of all pairs is faster
Some = TypeVar("Some", Tensor, NDArray[Any])  # the same operators on both


def _axes(coords: Some, places: Sequence[Some]) -> tuple[Some, Some, Some]:
    """Return the centres of cells, y [H, n] and x [W, n], and their squared diagonals [n].

    Args:
        coords: coordinates of crops, [n, 4].
        places: centres of rows and of columns in cells, [H, 1] and [W, 1].
    """
    (down, across), (left, top, right, bottom) = places, coords.T
    high, wide = (bottom - top) / len(down), (right - left) / len(across)
    return top + down * high, left + across * wide, high * high + wide * wide


def near_cells(
    coords_1: Float[Tensor, "n 4"], coords_2: Float[Tensor, "n 4"], shape: tuple[int, int], reach: float
) -> CellPairs:
    """List the pairs of cells of two crops whose centres are closer than `reach` diagonals of the larger cell.

    Distances are those of PixPro (arXiv 2011.10043, Sec. 3.1): in shares of the picture's sides, divided by the larger of the
    two crops' cell diagonals. Time and memory are linear in the pairs, except for maps of FEW cells at most.

    Args:
        coords_1, coords_2: coordinates of the crops, see the module.
        shape: rows and columns of both maps.
        reach: > 0, in diagonals; PixPro's threshold is 0.7.

    >>> whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> near_cells(whole, whole, (2, 2), 0.7).second
    tensor([0, 1, 2, 3])
    """
    one, two = widened(coords_1.detach()), widened(coords_2.detach())
    places = [torch.arange(cells, dtype=one.dtype, device=one.device)[:, None] + 0.5 for cells in shape]
    cells = shape[0] * shape[1]
    if cells <= FEW and one.is_cpu and not traced():
        first, second = _of_matrix(one.numpy(), two.numpy(), [place.numpy() for place in places], reach)
    else:
        first, second = _of_axes(one, two, places, reach)
    per_cell = torch.bincount(first, minlength=len(coords_1) * cells)
    return CellPairs(first, second, per_cell.cumsum(0) - per_cell, per_cell.view(-1, cells).sum(1))


def _squares(one: Some, two: Some, places: Sequence[Some]) -> tuple[Some, Some, Some, Some]:
    """Return squared distances, [H, H, n] of rows and [W, W, n] of columns, and both crops' squared diagonals [n].

    Pictures come last, which is fast.
    """
    (y1, x1, square_1), (y2, x2, square_2) = _axes(one, places), _axes(two, places)
    down, across = y1[:, None] - y2[None], x1[:, None] - x2[None]
    return down * down, across * across, square_1, square_2


def _of_matrix(
    one: NDArray[Any], two: NDArray[Any], places: Sequence[NDArray[Any]], reach: float
) -> tuple[Tensor, Tensor]:
    """Find the pairs of near cells in the matrix of all pairs. NumPy compares and divides in half of torch's time."""
    down, across, square_1, square_2 = _squares(one, two, places)
    high, wide = len(down), len(across)
    cells = high * wide
    left = one.dtype.type(reach**2) * np.maximum(square_1, square_2) - across  # of the squared reach, for the rows
    # One line of both sides is [(a, b)] of crop 2. So a comparison has long lines, and its result is in the order of the pairs.
    line_down = np.repeat(down.transpose(2, 0, 1), wide, 2)  # [n, H, H W]
    line_across = np.tile(left.transpose(2, 0, 1), high)  # [n, W, H W]
    place = np.flatnonzero(line_down[:, :, None] < line_across[:, None])
    first = place // cells
    return torch.from_numpy(first), torch.from_numpy(place + (first // cells - first) * cells)


def _of_axes(one: Tensor, two: Tensor, places: Sequence[Tensor], reach: float) -> tuple[Tensor, Tensor]:
    """Find the pairs of near cells from near rows and near columns. Time and memory are linear in the pairs."""
    down, across, square_1, square_2 = _squares(one, two, places)
    limit = reach**2 * torch.maximum(square_1, square_2)
    down, across = (square.permute(2, 0, 1).contiguous() for square in (down, across))
    high, wide = down.shape[1], across.shape[1]
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
    return cell[kept], ((picture * high + other_row) * wide + other_column)[kept]


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
