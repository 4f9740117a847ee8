"""Draw how regions of two crops of a picture are matched, and which regions attention picks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.operands import unit
from counterpoint.core.region_bags import attention, matched_regions
from counterpoint.data.images import ImageSplit
from counterpoint.data.shown import png
from counterpoint.views.images import ViewPipeline, denormalise, normalise
from counterpoint.views.images.pipeline import ViewParameters

PICTURES, REGIONS = 6, 8
SIDE = 96  # pixels of a picture as shown, at least


def region_figures(
    pictures: ImageSplit,
    features: Callable[[Float[Tensor, "n 3 height width"]], Float[Tensor, "n dim rows columns"]],
    pipeline: ViewPipeline,
    temperature: float = 0.1,
) -> dict[str, Any]:
    """Return a figure of matched regions and one of attention.

    Args:
        pictures: a split, of which some pictures are shown.
        features: map of normalised pictures.
        pipeline: makes the crops; the second is matched with the first.
        temperature: > 0, of the attention, by default 0.1.

    A match is right if the centres of the two regions are at most a cell apart in the picture.
    """
    rows = np.arange(len(pictures))[:: max(1, len(pictures) // PICTURES)][:PICTURES]
    pixels = pictures.images(rows)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    drawn = pipeline.draw(images.shape, torch.Generator().manual_seed(0))
    views = pipeline.apply(images, drawn)
    whole, own, other = (features(x).float().cpu() for x in (normalise(images), views[1], views[0]))
    weight = attention(whole.flatten(2).transpose(1, 2), temperature).view(len(rows), *whole.shape[2:])
    mine, theirs = (unit(x.flatten(2).transpose(1, 2)) for x in (own, other))
    number = matched_regions(mine, theirs)[1]
    shown = attention(own.flatten(2).transpose(1, 2), temperature).topk(min(REGIONS, mine.shape[1])).indices
    here, there = _centres(drawn[1], own), _centres(drawn[0], other)
    reach = drawn[0].boxes[:, 2:].float() / torch.tensor(other.shape[2:])
    joined, maps = [], []
    for at in range(len(rows)):
        lines = []
        for region in sorted(shown[at].tolist()):
            match = int(number[at, region])
            right = bool(((here[at, region] - there[at, match]).abs() <= reach[at]).all())
            ends = [_place(region, own), _place(match, other)]
            lines.append([*ends[0], *ends[1], right])
        crops = [(denormalise(view[at]) * 255).byte().permute(1, 2, 0).numpy() for view in views[1::-1]]
        pair = [png(crop, least=SIDE) for crop in crops]
        name = f"picture {rows[at]}"
        joined.append({"left": pair[0], "right": pair[1], "lines": lines, "text": name})
        maps.append({"png": png(pixels[at], least=SIDE), "maps": [{"text": name, "map": weight[at].tolist()}]})
    return {
        "Which region of the teacher's crop each region matched": {
            "kind": "joined",
            "rows": joined,
            "caption": "Left: the student's crop. Right: the teacher's crop of the same picture. A line joins a region with the "
            "region of the largest cosine. Dashed: the two are more than a cell apart in the picture. The regions with the "
            f"largest attention are drawn, at most {REGIONS}.",
        },
        "Key patches: the weights of attention": {
            "kind": "maps",
            "rows": maps,
            "caption": "Weight of each region of the whole picture under attention pooling, by the teacher's features. Mean "
            "pooling weighs all regions alike.",
        },
    }


def _place(region: int, found: Tensor) -> list[float]:
    """Return x and y of a region's centre in its crop, 0 to 1."""
    rows, columns = found.shape[2:]
    row, column = divmod(region, columns)
    return [round((column + 0.5) / columns, 4), round((row + 0.5) / rows, 4)]


def _centres(view: ViewParameters, found: Tensor) -> Float[Tensor, "n regions 2"]:
    """Compute y and x of the regions' centres in pixels of the picture."""
    rows, columns = found.shape[2:]
    y = ((torch.arange(rows) + 0.5) / rows).repeat_interleave(columns)
    x = ((torch.arange(columns) + 0.5) / columns).repeat(rows).expand(len(view.boxes), -1)
    x = torch.where(view.flip[:, None], 1 - x, x)
    top, left, height, width = view.boxes[:, :, None].float().unbind(1)
    return torch.stack([top + y * height, left + x * width], 2)
