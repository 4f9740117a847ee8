"""Measure a classifier of pictures with several labels: mean average precision, and F1 of the highest scores."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.tasks.measures.checks import finite

HIGHEST = 3  # scores of a picture that count as its labels


def tag_measures(scores: Float[Tensor, "n classes"], tags: Int[Tensor, "n classes"]) -> dict[str, float]:
    """Measure scores of classes against the classes that are present.

    Args:
        scores: any numbers, larger for a class that is more probable.
        tags: 1 where a class is present, else 0.

    Returns `mean_ap`, the average precision of each class in the mean over classes that some picture has and some lacks;
    `overall_ap`, of all scores together; `class_f1` and `overall_f1` of the 3 highest scores of each picture: F1 of the mean
    precision and recall over classes, and over pictures. Raises ValueError for shapes that do not fit, an empty batch and NaN.

    Source: the figures on NUS-WIDE of CAPro (Qin et al., NeurIPS 2023, arXiv 2310.09761), whose mAP is `overall_ap`.

    >>> tag_measures(torch.eye(4), torch.eye(4, dtype=torch.long))["mean_ap"]
    1.0
    """
    from sklearn.metrics import average_precision_score

    (scores,) = finite(scores=scores)
    if scores.ndim != 2 or not len(scores) or tags.shape != scores.shape:
        raise ValueError(
            f"scores and tags must be [n, classes] alike, n at least 1, got {list(scores.shape)}, {list(tags.shape)}"
        )
    present, values = tags.numpy() == 1, scores.numpy()
    judged = [n for n, own in enumerate(present.T) if own.any() and not own.all()]
    each = [average_precision_score(present[:, n], values[:, n]) for n in judged]
    top = scores.topk(min(HIGHEST, scores.shape[1])).indices
    said = torch.zeros_like(tags).scatter_(1, top, 1)
    right = (said * (tags == 1)).double()
    found = {
        "mean_ap": float(np.mean(each)) if each else math.nan,
        "overall_ap": float(average_precision_score(present.ravel(), values.ravel())) if present.any() else math.nan,
    }
    for name, axis in (("class_f1", 0), ("overall_f1", 1)):
        precision = (right.sum(axis) / said.sum(axis).clamp(min=1)).mean()
        recall = (right.sum(axis) / (tags == 1).sum(axis).clamp(min=1)).mean()
        found[name] = float(2 * precision * recall / (precision + recall).clamp(min=1e-12))
    return found
