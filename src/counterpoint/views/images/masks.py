"""Crop and flip masks as `ViewPipeline` crops and flips their pictures, by the nearest pixel."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from counterpoint.views.images.pipeline import ViewParameters


def cropped_masks(
    masks: UInt8[Tensor, "batch height width"], view: ViewParameters, fill: int = 255
) -> UInt8[Tensor, "batch size size"]:
    """Cut the box of a view out of every mask and scale it by the nearest pixel.

    Args:
        masks: class numbers.
        view: parameters of one view of the same pictures.
        fill: class number of pixels outside a mask, by default 255, which is unknown.
    """
    height, width = masks.shape[1:]
    boxes = view.boxes.to(masks.device)
    at = torch.arange(view.size, device=masks.device) + 0.5
    places = []
    for start, length, flip in ((boxes[:, 0], boxes[:, 2], None), (boxes[:, 1], boxes[:, 3], view.flip)):
        place = (at * (length[:, None] / view.size)).floor().long() + start[:, None]
        places.append(place if flip is None else torch.where(flip.to(masks.device)[:, None], place.flip(1), place))
    rows, columns = places
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    number = torch.arange(len(masks), device=masks.device)[:, None, None]
    found = masks[number, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return torch.where(inside, found, fill)
