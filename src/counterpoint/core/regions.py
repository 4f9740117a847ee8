"""Regions of feature maps: small squares at the points of a grid, their fixed neighbours, and the local contrast of both.

Source: Chaitanya et al., NeurIPS 2020, arXiv 2006.10511, Sec. 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide

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


@full_precision(keep=("positive_index", "negative_index"))
def local_region_contrastive_loss(
    feature_map: Float[Tensor, "n height width channels"],
    positive_index: Int[Tensor, "regions 2"],
    negative_index: Int[Tensor, "regions negatives 2"],
    strategy: int = 0,
    region_size: int = 3,
    temperature: float = 0.1,
    dense: Float[Tensor, "values dim"] | None = None,
) -> Float[Tensor, ""]:
    """Compute the local loss of regions of maps (Eq. 4).

    Args:
        feature_map: maps with channels last. Strategy 0 (L^R): rows 2i and 2i + 1 are two augmentations of one picture.
            Strategy 1 (L^D): rows i and n/2 + i are; the first n/2 are three volumes, slice by slice alike.
        positive_index: rows and columns of the regions' corners.
        negative_index: those of each region's negatives; one at the region's own place is left out.
        strategy: 0 (default) or 1.
        region_size: height and width of a region, by default 3.
        temperature: > 0, by default 0.1.
        dense: weight of a layer on a region's values, in the order row, column, channel. None (default): the values.

    Negatives lie in the anchor's map and in the positive's map. The sum over pairs is divided by regions and by n. Raises
    ValueError for shapes that do not fit, corners outside the map and arguments out of range.

    >>> local_region_contrastive_loss(torch.ones(2, 12, 12, 1), *grid_regions(12, 12))  # log(1 + 10)
    tensor(2.3979)
    """
    need_positive(temperature=temperature)
    if strategy not in (0, 1):
        raise ValueError(f"strategy must be 0 or 1, got {strategy}")
    n = len(feature_map)
    if feature_map.ndim != 4 or n % (6 if strategy else 2):
        raise ValueError(
            f"feature_map must be [n, height, width, channels] with n a multiple of {6 if strategy else 2}, got "
            f"{shapes(feature_map=feature_map)}"
        )
    need_rows(feature_map=feature_map)
    device = feature_map.device
    positive, negative = (index.long().to(device) for index in (positive_index, negative_index))
    corners, which = torch.cat([positive, negative.flatten(0, 1)]).unique(dim=0, return_inverse=True)
    most = torch.tensor(feature_map.shape[1:3], device=device) - region_size
    if bool((corners < 0).any()) or bool((corners > most).any()):
        raise ValueError(f"regions of {region_size} cells lie outside maps of {list(feature_map.shape[1:3])} cells")
    values = region_rows(feature_map, corners, region_size)
    rows = unit(values if dense is None else values @ wide(dense))
    regions = len(positive)
    own, others = which[:regions], which[regions:].view(regions, -1)
    at = torch.arange(n, device=device)
    if strategy == 0:
        first, second = at, at ^ 1
    else:
        half, third = n // 2, n // 6
        one = at[:half]
        first, second = one.repeat(3), torch.cat([one + half, (one + third) % half, (one + 2 * third) % half])
    anchor = rows[:, own] / temperature  # [n, regions, dim]
    within = (anchor @ rows.mT).gather(2, others.expand(n, -1, -1))  # of the anchor's own map
    across = anchor[first] @ rows[second].mT
    same = others == own[:, None]
    negatives = torch.cat([within[first], across.gather(2, others.expand(len(first), -1, -1))], 2)
    negatives = negatives.masked_fill(torch.cat([same, same], 1), -torch.inf)
    towards = across.gather(2, own.expand(len(first), -1)[..., None])
    return (torch.cat([towards, negatives], 2).logsumexp(2) - towards[..., 0]).sum() / regions / n
