"""Find the subject of a picture before a plain ground, and put it on white: in the middle, or at a random place and scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

AWAY = 0.2  # distance of colours (0..1, largest channel) from the ground
SHARE = 0.8  # of the picture that the longer side of a centred subject fills
SCALES = (0.5, 0.9)  # of a subject at a random place


def subject_mask(pictures: Float[Tensor, "n 3 h w"]) -> Bool[Tensor, "n h w"]:
    """Mark pixels whose colour differs from the ground, the median of the picture's border. Pictures are in 0..1.

    A picture without such pixels is marked whole.
    """
    border = torch.cat([pictures[:, :, 0], pictures[:, :, -1], pictures[:, :, :, 0], pictures[:, :, :, -1]], 2)
    ground = border.median(2).values[:, :, None, None]
    mask = (pictures - ground).abs().amax(1) > AWAY
    return mask | ~mask.any((1, 2), keepdim=True)


def on_white(
    pictures: Float[Tensor, "n 3 h w"], segment: bool, drawn: Float[Tensor, "n 3"] | None = None
) -> Float[Tensor, "n 3 h w"]:
    """Cut the subject out, and put it on white.

    Args:
        pictures: values in 0..1.
        segment: find the subject by `subject_mask`; otherwise the whole picture is the subject.
        drawn: numbers in 0..1 for scale, column and row; None: in the middle, filling 0.8 of the picture.
    """
    n, _, height, width = pictures.shape
    mask = subject_mask(pictures) if segment else torch.ones_like(pictures[:, 0], dtype=torch.bool)
    low, high = [], []
    for seen in (mask.any(1), mask.any(2)):  # columns, then rows; in -1..1
        length = seen.shape[1]
        low.append(seen.int().argmax(1).float() / length * 2 - 1)
        high.append(1 - seen.flip(1).int().argmax(1).float() / length * 2)
    a, b = torch.stack(low, 1), torch.stack(high, 1)
    middle, half = (a + b) / 2, ((b - a) / 2).amax(1)
    if drawn is None:
        scale, place = torch.full_like(half, SHARE), torch.zeros_like(middle)
    else:
        scale = SCALES[0] + (SCALES[1] - SCALES[0]) * drawn[:, 0]
        place = (2 * drawn[:, 1:] - 1) * (1 - scale)[:, None]
    zoom = half / scale  # source distance of one step of the target
    matrix = torch.zeros(n, 2, 3, device=pictures.device, dtype=pictures.dtype)
    matrix[:, 0, 0] = matrix[:, 1, 1] = zoom
    matrix[:, :, 2] = middle - zoom[:, None] * place
    grid = F.affine_grid(matrix, [n, 3, height, width], align_corners=False)
    weight = F.grid_sample(mask[:, None].to(pictures.dtype), grid, align_corners=False)
    cut = F.grid_sample(pictures * mask[:, None], grid, align_corners=False)
    return cut + (1 - weight)
