"""Cut and mirror boxes as `ViewPipeline` crops and flips their pictures."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from counterpoint.views.images.pipeline import ViewParameters

VISIBLE = 0.25  # share of a box's area that a crop must show for its object to count


def cropped_boxes(
    boxes: Float[Tensor, "batch n 4"], view: ViewParameters, visible: float = VISIBLE
) -> tuple[Float[Tensor, "batch n 4"], Bool[Tensor, "batch n"]]:
    """Return the boxes in pixels of a view, cut at its edges, and whether enough of each is seen.

    Args:
        boxes: left, top, right, bottom in pixels of the pictures.
        view: parameters of one view of the same pictures.
        visible: share of a box's area that the view must show, 0 to 1, by default 0.25. What it shows must also be at least
            a pixel wide and high.

    >>> from counterpoint.views.images import ViewPipeline
    >>> (view,) = ViewPipeline(8, 1, "none").draw((1, 3, 16, 16), torch.Generator())
    >>> cropped_boxes(torch.tensor([[[4.0, 2.0, 8.0, 6.0]]]), view)[0].tolist()
    [[[2.0, 1.0, 4.0, 3.0]]]
    """
    crop = view.boxes.to(boxes.device).to(boxes.dtype)
    start, length = crop[:, None, [1, 0, 1, 0]], crop[:, None, [3, 2, 3, 2]]
    moved = (boxes - start) * (view.size / length)
    left, top, right, bottom = moved.unbind(2)
    flip = view.flip.to(boxes.device)[:, None]
    left, right = torch.where(flip, view.size - right, left), torch.where(flip, view.size - left, right)
    moved = torch.stack([left, top, right, bottom], 2)
    cut = moved.clamp(0, view.size)
    sides, before = cut[..., 2:] - cut[..., :2], moved[..., 2:] - moved[..., :2]
    return cut, (sides >= 1).all(2) & (sides.prod(2) >= visible * before.prod(2))
