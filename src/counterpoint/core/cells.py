"""Cells of feature maps of two crops of one picture: their places in the picture, and the cells that lie near each other.

A crop's coordinates are (left, top, right, bottom) in the picture, in shares of its width and height. A flipped crop has its
left and right exchanged. Cell (a, b) of a map of H x W cells has the centre

    x = left + (b + 1/2) (right - left) / W,      y = top + (a + 1/2) (bottom - top) / H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class CellPairs(NamedTuple):
    """Pairs of near cells of n pictures with H x W = T cells each, sorted by the first cell."""

    first: Int[Tensor, " pairs"]  # picture * T + cell of crop 1
    second: Int[Tensor, " pairs"]  # picture * T + cell of crop 2
    starts: Int[Tensor, " cells"]  # of every cell of crop 1, its first pair
    counts: Int[Tensor, " n"]  # number of pairs of each picture


def _axes(coords: Tensor, shape: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the centres (y [n, H], x [n, W]) of the cells of crops, and their squared diagonals [n]."""
    found, square = [], coords.new_zeros(len(coords))
    for low, high, cells in ((1, 3, shape[0]), (0, 2, shape[1])):
        step = (coords[:, high] - coords[:, low]) / cells
        at = torch.arange(cells, dtype=coords.dtype, device=coords.device) + 0.5
        found.append(coords[:, low, None] + at * step[:, None])
        square = square + step.square()
    return (found[0], found[1]), square


def near_cells(
    coords_1: Float[Tensor, "n 4"], coords_2: Float[Tensor, "n 4"], shape: tuple[int, int], reach: float
) -> CellPairs:
    """List the pairs of cells of two crops whose centres are closer than `reach` diagonals of the larger cell.

    Distances are those of PixPro (arXiv 2011.10043, Sec. 3.1): in shares of the picture's sides, divided by the larger of the
    two crops' cell diagonals. Time and memory are linear in the pairs: the near rows and the near columns of a cell
    are found first.

    Args:
        coords_1, coords_2: coordinates of the crops, see the module.
        shape: rows and columns of both maps.
        reach: > 0, in diagonals; PixPro's threshold is 0.7.

    >>> whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> near_cells(whole, whole, (2, 2), 0.7).second
    tensor([0, 1, 2, 3])
    """
    high, wide = shape
    (y1, x1), square_1 = _axes(coords_1, shape)
    (y2, x2), square_2 = _axes(coords_2, shape)
    limit = reach**2 * torch.maximum(square_1, square_2)
    down = (y1[:, :, None] - y2[:, None, :]).square_()  # [n, H, H]
    across = (x1[:, :, None] - x2[:, None, :]).square_()  # [n, W, W]
    # Near rows of a row follow each other, and so do near columns: a beginning and a number for each.
    near_rows, near_columns = (square < limit[:, None, None] for square in (down, across))
    top, left = (near.to(torch.uint8).argmax(2) for near in (near_rows, near_columns))
    tall, broad = near_rows.sum(2), near_columns.sum(2)
    most = (tall[:, :, None] * broad[:, None, :]).flatten()  # candidates of each cell of crop 1
    cell = torch.repeat_interleave(torch.arange(len(most), device=most.device), most)
    place = torch.arange(len(cell), device=cell.device) - (most.cumsum(0) - most)[cell]
    row, column = cell // wide, cell // (high * wide) * wide + cell % wide  # of the flattened axes of all pictures
    width = broad.flatten()[column]
    other_row = top.flatten()[row] + place // width
    other_column = left.flatten()[column] + place % width
    distance = down.flatten()[row * high + other_row] + across.flatten()[column * wide + other_column]
    picture = cell // (high * wide)
    kept = distance < limit[picture]
    cell, picture = cell[kept], picture[kept]
    second = (picture * high + other_row[kept]) * wide + other_column[kept]
    per_cell = torch.bincount(cell, minlength=len(most))
    return CellPairs(cell, second, per_cell.cumsum(0) - per_cell, torch.bincount(picture, minlength=len(coords_1)))


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
