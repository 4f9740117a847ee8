"""Near cells of two crops: against the matrix of all distances, over flips, sizes and crops that do not meet."""

from __future__ import annotations

import pytest
import torch

from counterpoint.core import cells
from counterpoint.core.cells import near_cells, near_cells_both_ways, near_sums


def plain(coords_1, coords_2, shape, reach):
    """Return [n, T, T] whether cells are near, by the formula of the card, with the matrix of all distances."""
    high, wide = shape

    def centres(c):
        dx, dy = (c[:, 2] - c[:, 0]) / wide, (c[:, 3] - c[:, 1]) / high
        x = c[:, 0, None, None] + (torch.arange(wide) + 0.5) * dx[:, None, None]
        y = c[:, 1, None, None] + (torch.arange(high) + 0.5)[:, None] * dy[:, None, None]
        x, y = (a.expand(len(c), high, wide).flatten(1) for a in (x, y))
        return x, y, (dx**2 + dy**2).sqrt()

    x1, y1, d1 = centres(coords_1)
    x2, y2, d2 = centres(coords_2)
    distance = ((x1[:, :, None] - x2[:, None]) ** 2 + (y1[:, :, None] - y2[:, None]) ** 2).sqrt()
    return distance / torch.maximum(d1, d2)[:, None, None] < reach


def boxes(seed, n):
    low = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.6
    side = 0.1 + 0.3 * torch.rand(n, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    found = torch.cat([low, low + side], 1)
    found[::2] = found[::2][:, [2, 1, 0, 3]]  # every second one is flipped
    return found


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (7, 4), (3, 8), (13, 12)])  # of the matrix, and of the axes
@pytest.mark.parametrize("reach", [0.3, 0.7, 2.5, 100.0])
def test_pairs_equal_the_matrix_of_distances(shape, reach):
    one, two = boxes(0, 6), boxes(5, 6)
    wanted = plain(one, two, shape, reach)
    found = near_cells(one, two, shape, reach)
    each = shape[0] * shape[1]
    dense = torch.zeros_like(wanted)
    dense.view(-1, each)[found.first, found.second % each] = True
    assert torch.equal(dense, wanted)
    assert torch.equal(found.first // each, found.second // each)  # pairs stay within a picture
    assert torch.equal(found.counts, wanted.sum((1, 2)))
    assert (found.first.diff() >= 0).all()


@pytest.mark.parametrize("torch_alone", [False, True])
def test_pairs_of_both_directions_are_those_of_crops_exchanged(torch_alone, monkeypatch):
    monkeypatch.setattr(cells, "traced", lambda: torch_alone)
    one, two = boxes(0, 6), boxes(5, 6)
    found = near_cells_both_ways(one, two, (6, 5), 1.2)
    wanted = near_cells(one, two, (6, 5), 1.2), near_cells(two, one, (6, 5), 1.2)
    assert len(wanted[0].first) > 6
    for mine, other in zip(found, wanted, strict=True):
        for a, b in zip((*mine, mine.first), (*other, other.first), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == torch.int64


@pytest.mark.parametrize("reach", [0.05, 1.2, 100.0])
def test_numpy_in_parts_and_torch_find_the_same_pairs(reach, monkeypatch):
    one, two = boxes(0, 6), boxes(5, 6)
    found = [near_cells(one, two, (6, 5), reach)]
    for name, value in (("HELD", 1), ("HELD", 100), ("traced", lambda: True)):
        monkeypatch.setattr(cells, name, value)
        found.append(near_cells(one, two, (6, 5), reach))
    for first, *others in zip(*found, strict=True):
        for other in others:
            assert torch.equal(first, other)
            assert first.dtype == other.dtype


def test_sums_equal_the_product_with_the_mask():
    one, two = boxes(1, 4), boxes(9, 4)
    values = torch.randn(4, 35, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = near_cells(one, two, (7, 5), 1.5)
    wanted = plain(one, two, (7, 5), 1.5).double() @ values
    torch.testing.assert_close(near_sums(pairs, values.flatten(0, 1)).view_as(values), wanted)


def test_crops_that_do_not_meet_have_no_pairs():
    one, two = torch.tensor([[0.0, 0.0, 0.2, 0.2]]), torch.tensor([[0.7, 0.7, 1.0, 1.0]])
    found = near_cells(one, two, (4, 4), 0.7)
    assert len(found.first) == 0
    assert found.counts.tolist() == [0]
    assert near_sums(found, torch.ones(16, 2)).abs().sum() == 0


def test_crop_without_extent_has_no_pairs():
    point = torch.full((1, 4), 0.5)
    assert near_cells(point, point, (2, 2), 0.7).counts.tolist() == [0]
