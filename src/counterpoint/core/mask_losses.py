"""Compute losses of one class of pixels against the background, and the labels of coarse patches.

The weights are those of ESP-MedSAM: Xu and others, arXiv 2407.14153. Dice: Milletari and others, arXiv 1606.04797.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group

IGNORE = 255  # class number of a pixel whose class is unknown


def patch_labels(masks: Integer[Tensor, "n height width"], rows: int, columns: int) -> Int[Tensor, "n rows columns"]:
    """Label the patches of masks: 1 where any pixel is foreground, else 255 where any is unknown, else 0.

    Args:
        masks: class numbers; 0 is the background, 255 unknown, others are foreground.
        rows, columns: number of patches, at most the number of pixels.

    Raises ValueError for other shapes.

    >>> patch_labels(torch.tensor([[[0, 1, 0, 0], [0, 255, 0, 255]]]), 1, 2)
    tensor([[[  1, 255]]])
    """
    if masks.ndim != 3 or not (1 <= rows <= masks.shape[1] and 1 <= columns <= masks.shape[2]):
        raise ValueError(f"masks must be [n, height, width] of at least {rows} x {columns}, got {shapes(masks=masks)}")
    known = masks != IGNORE
    parts = torch.stack([(masks != 0) & known, ~known], 1).float()
    foreground, unsure = F.adaptive_max_pool2d(parts, (rows, columns)).bool().unbind(1)
    return torch.where(foreground, 1, torch.where(unsure, IGNORE, 0))


@over_group
@full_precision
def binary_mask_loss(
    logits: Float[Tensor, "n height width"],
    masks: Integer[Tensor, "n height width"],
    bce_weight: float = 0.8,
    dice_weight: float = 0.2,
) -> Float[Tensor, ""]:
    """Compute a weighted sum of binary cross-entropy and of 1 - Dice, the mean over pictures, over all processes.

    The cross-entropy is the mean over a picture's known pixels. Dice is (2 sum(p y) + 1) / (sum p + sum y + 1), p the sigmoid.

    Args:
        logits: one number per pixel.
        masks: class numbers; 0 is the background, 255 unknown, others are foreground.
        bce_weight: weight of the cross-entropy, at least 0, by default 0.8.
        dice_weight: weight of the Dice term, at least 0, by default 0.2.

    An empty mask has Dice 1 for an empty prediction. A picture without a known pixel counts as 0, with gradient 0. Raises
    ValueError for an empty batch, shapes that differ, and weights below 0.

    >>> binary_mask_loss(torch.full((1, 2, 2), -50.0), torch.zeros(1, 2, 2).long())
    tensor(0.)
    """
    if logits.ndim != 3 or masks.shape != logits.shape:
        raise ValueError(f"logits and masks must be [n, height, width], got {shapes(logits=logits, masks=masks)}")
    if min(bce_weight, dice_weight) < 0:
        raise ValueError(f"bce_weight and dice_weight must not be negative, got {bce_weight} and {dice_weight}")
    need_rows(logits=logits)
    known = masks != IGNORE
    y = ((masks != 0) & known).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, y, reduction="none").where(known, 0.0)
    bce = each.sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
    p = logits.sigmoid().where(known, 0.0)
    dice = 1 - (2 * (p * y).sum((1, 2)) + 1) / (p.sum((1, 2)) + y.sum((1, 2)) + 1)
    return global_mean(bce_weight * bce + dice_weight * dice)


@over_group
@full_precision
def soft_dice_loss(
    logits: Float[Tensor, "n classes height width"], masks: Integer[Tensor, "n height width"], foreground: bool = False
) -> Float[Tensor, ""]:
    """Compute 1 - mean over pictures and classes of 2 sum(p y) / (sum p + sum y + 1e-10), p = softmax(logits).

    Args:
        logits: one number per class and pixel.
        masks: class numbers, 255 where unknown; unknown pixels do not count.
        foreground: leave out class 0. Default: all classes.

    A class without a pixel in truth and prediction counts as 0, as in the authors' code. Raises ValueError for an empty batch
    and shapes that differ.

    >>> soft_dice_loss(torch.tensor([[[[50.0, -50.0]], [[-50.0, 50.0]]]]), torch.tensor([[[0, 1]]]))
    tensor(0.)
    """
    if logits.ndim != 4 or masks.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(
            f"masks must be [n, height, width] of logits' pixels, got {shapes(logits=logits, masks=masks)}"
        )
    need_rows(logits=logits)
    known = (masks != IGNORE)[:, None]
    p = logits.softmax(1) * known
    y = F.one_hot(torch.where(known[:, 0], masks.long(), 0), logits.shape[1]).permute(0, 3, 1, 2) * known
    dice = 2 * (p * y).sum((2, 3)) / (p.sum((2, 3)) + y.sum((2, 3)) + 1e-10)
    return 1 - global_mean(dice[:, 1 if foreground else 0 :].mean(1))
