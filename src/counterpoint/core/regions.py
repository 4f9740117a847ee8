"""Regions of feature maps: small squares at the points of a grid, and their fixed neighbours (arXiv 2006.10511, Sec. 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Grid points 0..4 x 0..4 of 13 regions, each with its five nearest points, as "row column".
NEIGHBOURS = {
    "00": "02 11 12 20 21",
    "02": "00 04 11 13 22",
    "04": "02 12 13 23 24",
    "20": "00 11 22 40 31",
    "22": "11 13 31 33 20",
    "24": "04 22 44 13 33",
    "40": "20 21 42 31 32",
    "42": "22 40 44 31 33",
    "44": "23 24 42 33 32",
    "11": "00 02 20 22 13",
    "13": "02 04 11 22 24",
    "31": "20 22 40 42 33",
    "33": "22 24 42 44 31",
}


class Regions(NamedTuple):
    """The corners of regions and of their negatives."""

    positive: Int[Tensor, "regions 2"]
    negative: Int[Tensor, "regions negatives 2"]


def grid_regions(height: int, width: int, region: int = 3, negatives: int = 5) -> Regions:
    """Return 13 regions on a quarter grid of a map, with their neighbours as negatives.

    Args:
        height, width: of the map, at least `region` + 2.
        region: height and width of a region, by default 3.
        negatives: number of neighbours, 1 to 5, by default 5.

    Raises ValueError for a map that is too small and for numbers out of range.

    >>> grid_regions(12, 12).positive[4]
    tensor([4, 4])
    """
    if region < 1 or min(height, width) < region + 2:
        raise ValueError(
            f"regions of {region} x {region} need a map of at least {region + 2} cells a side, got {height} x {width}"
        )
    if not 1 <= negatives <= 5:
        raise ValueError(f"negatives must lie in 1..5, got {negatives}")

    def corner(point: str) -> list[int]:
        reach = [extent - (4 if region == 3 else region) for extent in (height, width)]
        return [int(number) * extent // 4 for number, extent in zip(point, reach, strict=True)]

    positive = [corner(point) for point in NEIGHBOURS]
    negative = [[corner(point) for point in points.split()[:negatives]] for points in NEIGHBOURS.values()]
    return Regions(torch.tensor(positive), torch.tensor(negative))


def region_rows(
    maps: Float[Tensor, "n height width channels"], corners: Int[Tensor, "regions 2"], region: int
) -> Float[Tensor, "n regions values"]:
    """Return the values of the squares with these corners, in the order row, column, channel."""
    within = torch.arange(region, device=maps.device)
    rows = (corners[:, 0, None] + within)[:, :, None]
    columns = (corners[:, 1, None] + within)[:, None, :]
    return maps[:, rows, columns].flatten(2)
