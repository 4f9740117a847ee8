"""Measure the distance between the surfaces of predicted and true volumes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Integer
from numpy.typing import NDArray

from counterpoint.data.dense import IGNORE


def surface_distances(
    truth: Bool[np.ndarray, "*axes"], predicted: Bool[np.ndarray, "*axes"], spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the distance of each surface voxel of one mask to the surface of the other, in both directions.

    A surface voxel belongs to the mask. One of its neighbours beside a face does not, or it lies at the edge of the volume.
    Distances are Euclidean, between centres of voxels (scipy's exact distance transform).

    Args:
        truth, predicted: masks of equal shape, neither of them empty.
        spacing: distance between voxels along each axis, in mm, > 0.

    Returns distances in mm: those of the true surface to the predicted one, and those of the predicted to the true one.
    Raises ValueError for shapes that do not fit, a spacing that is not positive, and an empty mask.
    """
    from scipy.ndimage import binary_erosion, distance_transform_edt

    if truth.shape != predicted.shape or len(spacing) != truth.ndim or not min(spacing) > 0:
        raise ValueError(
            f"truth and predicted must have one shape and a spacing > 0 for each axis, got {list(truth.shape)}, "
            f"{list(predicted.shape)}, {list(spacing)}"
        )
    if not truth.any() or not predicted.any():
        raise ValueError("truth and predicted must each have a voxel; the distance to an empty mask is not defined")
    # The common box is enough: no other voxel is on a surface.
    box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in np.nonzero(truth | predicted))
    surfaces = [mask[box] & ~binary_erosion(mask[box]) for mask in (truth, predicted)]
    to_truth, to_predicted = (distance_transform_edt(~surface, sampling=list(spacing)) for surface in surfaces)
    return to_predicted[surfaces[0]], to_truth[surfaces[1]]


def hausdorff(
    truth: Bool[np.ndarray, "*axes"],
    predicted: Bool[np.ndarray, "*axes"],
    spacing: Sequence[float],
    percentile: float = 95.0,
) -> float:
    """Compute the Hausdorff distance of two masks in mm, or a percentile of it: the larger of both directions' percentiles.

    Args:
        truth, predicted, spacing: see `surface_distances`. Masks may be empty.
        percentile: 100 for the Hausdorff distance itself; by default 95 (HD95), which single voxels do not change.

    Where one mask is empty it is the diagonal of the volume, the worst possible; nan where both are.

    >>> a, b = np.zeros((1, 1, 5), bool), np.zeros((1, 1, 5), bool)
    >>> a[..., 0], b[..., 3] = True, True
    >>> hausdorff(a, b, (5.0, 1.0, 0.5))
    1.5
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must lie in 0..100, got {percentile}")
    if not truth.any() and not predicted.any():
        return float("nan")
    if not truth.any() or not predicted.any():
        return float(np.linalg.norm(np.array(truth.shape) * np.asarray(spacing)))
    return max(float(np.percentile(part, percentile)) for part in surface_distances(truth, predicted, spacing))


def volume_distances(
    truth: Integer[np.ndarray, "*axes"],
    predicted: Integer[np.ndarray, "*axes"],
    classes: int,
    spacing: Sequence[float],
    *,
    background: bool = True,
) -> NDArray[np.float64]:
    """Compute HD95 of each class of a volume, [classes] in mm; nan for the background and for a class in neither volume.

    Voxels of unknown class (IGNORE) belong to no class in both volumes.

    Args:
        truth, predicted: class numbers of the voxels.
        classes: number of classes.
        spacing: see `surface_distances`.
        background: whether class 0 is the background, which has no surface of its own.
    """
    known = truth != IGNORE
    return np.array(
        [
            float("nan")
            if background and number == 0
            else hausdorff((truth == number) & known, (predicted == number) & known, spacing)
            for number in range(classes)
        ]
    )
