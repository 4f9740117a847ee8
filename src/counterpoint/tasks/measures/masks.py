"""Measure predicted masks: intersection over union and Dice from a confusion matrix of pixels."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.data.dense import IGNORE


def pixel_confusion(
    truth: Int[Tensor, ...], predicted: Int[Tensor, ...], classes: int
) -> Int[Tensor, "classes classes"]:
    """Count pixels by true class (rows) and predicted class (columns). Pixels of class IGNORE are left out.

    Raises ValueError for a class outside 0..classes - 1.

    >>> pixel_confusion(torch.tensor([0, 1, 255]), torch.tensor([0, 0, 1]), 2)
    tensor([[1, 0],
            [1, 0]])
    """
    known = truth != IGNORE
    rows, columns = truth[known].long(), predicted[known].long()
    for name, numbers in (("truth", rows), ("predicted", columns)):
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < classes:
            raise ValueError(
                f"{name} has classes {int(numbers.min())} to {int(numbers.max())}, outside 0..{classes - 1}"
            )
    return torch.bincount(rows * classes + columns, minlength=classes**2).view(classes, classes)


def ious(table: Int[Tensor, "classes classes"]) -> NDArray[np.float64]:
    """Compute each class's intersection over union of all pixels; nan for a class in neither truth nor prediction.

    Args:
        table: a confusion matrix whose rows are the truth. Summing the tables of all pictures first gives the field's mIoU.

    >>> ious(torch.tensor([[1, 0], [1, 0]])).tolist()
    [0.5, 0.0]
    """
    counts = table.double().numpy()
    hit = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - hit
    return np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)


def dices(table: Int[Tensor, "classes classes"]) -> NDArray[np.float64]:
    """Compute each class's Dice coefficient 2 |A and B| / (|A| + |B|); nan for a class in neither truth nor prediction.

    >>> dices(torch.tensor([[1, 0], [1, 0]])).round(4).tolist()
    [0.6667, 0.0]
    """
    counts = table.double().numpy()
    both = counts.sum(0) + counts.sum(1)
    hit = 2 * np.diag(counts)
    return np.divide(hit, both, out=np.full_like(hit, np.nan), where=both > 0)
