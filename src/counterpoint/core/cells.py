"""Cells of feature maps of two crops of one picture: their places in the picture, and the cells that lie near each other.

A crop's coordinates are (left, top, right, bottom) in the picture, in shares of its width and height. A flipped crop has its
left and right exchanged. Cell (a, b) of a map of H x W cells has the centre

    x = left + (b + 1/2) (right - left) / W,      y = top + (a + 1/2) (bottom - top) / H.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.precision import wide as widened
from counterpoint.core.transforms import traced


class CellPairs(NamedTuple):
    """Pairs of near cells of n pictures with H x W = T cells each, sorted by the first cell."""

    first: Int[Tensor, " pairs"]  # picture * T + cell of crop 1
    second: Int[Tensor, " pairs"]  # picture * T + cell of crop 2
    starts: Int[Tensor, " cells"]  # of every cell of crop 1, its first pair
    counts: Int[Tensor, " n"]  # number of pairs of each picture


FEW = 128  # cells of a map up to which the matrix of all pairs is faster


def _axes(coords: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centres of cells, y [H, n] and x [W, n], and their squared diagonals [n]."""
    found, square = [], coords.new_zeros(len(coords))
    for low, high, cells in ((1, 3, shape[0]), (0, 2, shape[1])):
        step = (coords[:, high] - coords[:, low]) / cells
        at = torch.arange(cells, dtype=coords.dtype, device=coords.device)[:, None] + 0.5
        found.append(coords[:, low].contiguous() + at * step)
        square = square + step.square()
    return found[0], found[1], square


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
    (y1, x1, square_1), (y2, x2, square_2) = (_axes(widened(coords), shape) for coords in (coords_1, coords_2))
    limit = reach**2 * torch.maximum(square_1, square_2)
    # Squared distances on each axis, [H, H, n] and [W, W, n]: pictures come last, which is fast.
    down, across = ((a[:, None] - b[None]).square_() for a, b in ((y1, y2), (x1, x2)))
    cells = shape[0] * shape[1]
    first, second = (_of_matrix if cells <= FEW else _of_axes)(down, across, limit)
    per_cell = torch.bincount(first, minlength=len(coords_1) * cells)
    return CellPairs(first, second, per_cell.cumsum(0) - per_cell, per_cell.view(-1, cells).sum(1))


def _of_matrix(down: Tensor, across: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Find the pairs of near cells in the matrix of all pairs."""
    high, wide = len(down), len(across)
    cells = high * wide
    # One line of both sides is [(a, b)] of crop 2. So a comparison has long lines, and its result is in the order of the pairs.
    line_down = down.permute(2, 0, 1).repeat_interleave(wide, 2)  # [n, H, H W]
    line_across = (limit - across).permute(2, 0, 1).repeat(1, 1, high)  # [n, W, H W]
    place = _places(line_down[:, :, None] < line_across[:, None])
    first = place // cells
    return first, place - first * cells + first // cells * cells


def _places(mask: Tensor) -> Tensor:
    """Return the flat places of the true entries. On a CPU, NumPy finds them four times as fast as torch."""
    if mask.is_cpu and not traced():
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero()[:, 0]


def _of_axes(down: Tensor, across: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Find the pairs of near cells from near rows and near columns. Time and memory are linear in the pairs."""
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
