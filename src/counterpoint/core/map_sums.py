"""Sums and means of maps over the regions of a mask, and over modalities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from counterpoint.core.checks import shapes
from counterpoint.core.distributed import gather_rows
from counterpoint.core.precision import full_precision

Maps = Float[Tensor, "modalities n channels rows columns"]
Map = Float[Tensor, "n channels rows columns"]


@full_precision
def class_sums(
    features: Map, masks: Integer[Tensor, "n height width"], classes: int
) -> tuple[Float[Tensor, "n classes channels"], Int[Tensor, "n classes"]]:
    """Sum the features of each class in each image, for masked average pooling, and count its cells.

    Args:
        features: maps.
        masks: class numbers; those outside 0..classes - 1, such as 255 for unknown, count nowhere. The masks are scaled to
            the maps by the nearest pixel.
        classes: number of classes.

    Raises ValueError for shapes that do not fit.

    >>> sums, counts = class_sums(torch.ones(1, 1, 2, 2), torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8), 2)
    >>> sums.flatten(), counts.flatten()
    (tensor([1., 2.]), tensor([1, 2]))
    """
    if features.ndim != 4 or masks.ndim != 3 or len(features) != len(masks):
        raise ValueError(f"features must be [n, channels, rows, columns] and masks [n, height, width], got "
                         f"{shapes(features=features, masks=masks)}")  # fmt: skip
    small = F.interpolate(masks[:, None].float(), features.shape[2:], mode="nearest-exact")[:, 0]
    of = small.flatten(1)[:, None] == torch.arange(classes, device=masks.device)[:, None]
    return of.to(features.dtype) @ features.flatten(2).transpose(1, 2), of.sum(2)


def class_means(
    features: Map, masks: Integer[Tensor, "n height width"], classes: int, whole: bool = False
) -> tuple[Float[Tensor, "*n classes channels"], Bool[Tensor, "*n classes"]]:
    """Average the features of each class (masked average pooling); zeros, and False, where a class is absent.

    Args:
        features, masks, classes: as in `class_sums`.
        whole: average over the batch of all processes, without the axis n. Default: over each image.
    """
    sums, counts = class_sums(features, masks, classes)
    if whole:
        sums, counts = (gather_rows(x.sum(0)[None]).sum(0) for x in (sums, counts))
    return sums / counts.clamp(min=1)[..., None], counts > 0


def weighted_sum(features: Maps, weight: Tensor) -> Map:
    """Return the sum over modalities by weights [M, n] or [M, n, rows, columns], without a second [M, ...] tensor."""
    weight = weight[..., None, None, None] if weight.ndim == 2 else weight[:, :, None]
    first, *others = features.unbind(0)
    found = first * weight[0]
    for n, x in enumerate(others, start=1):
        found = torch.addcmul(found, x, weight[n])
    return found


def mean_weights(present: Bool[Tensor, "modalities n"], dtype: torch.dtype) -> Float[Tensor, "modalities n"]:
    """Return the weights of a mean over the modalities that are there; zeros where there is none."""
    return present.to(dtype) / present.sum(0).clamp(min=1)


def inverse_length(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return 1 / length over axes; 0 for zeros, with gradient 0 there."""
    square = x.square().sum(axes)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).rsqrt(), 0.0)
