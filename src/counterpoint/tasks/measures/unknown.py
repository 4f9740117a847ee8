"""Measure a classifier on an open set: pictures of known classes among pictures of no known class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.tasks.measures.checks import finite

THRESHOLDS = 100  # between 0.01 and 0.99


def open_set_f1(probability: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """Compute the mean F1 of an open set over 100 thresholds of confidence, 0.01 to 0.99.

    A picture counts as of no known class where its largest probability is not above the threshold. That is one class more. F1 is
    that of the mean precision and the mean recall over all classes.

    Args:
        probability: of the known classes.
        labels: classes, -1 for a picture of no known class.

    Raises ValueError for shapes that do not fit, an empty batch and NaN. Source: the open-set figure of CAPro (Qin et al.,
    NeurIPS 2023, arXiv 2310.09761).

    >>> open_set_f1(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.005, 0.005]]), torch.tensor([0, 1, -1]))
    1.0
    """
    (probability,) = finite(probability=probability)
    if probability.ndim != 2 or not len(probability) or labels.shape != probability.shape[:1]:
        raise ValueError(
            f"probability must be [n, classes] and labels [n], n at least 1, got {list(probability.shape)} and {list(labels.shape)}"
        )
    classes = probability.shape[1]
    confidence, guess = probability.max(1)
    truth = torch.where(labels < 0, classes, labels)
    found = []
    for threshold in np.linspace(0.01, 0.99, THRESHOLDS):
        said = torch.where(confidence > threshold, guess, classes)
        table = torch.zeros(classes + 1, classes + 1).index_put_((truth, said), torch.ones(len(truth)), accumulate=True)
        right = table.diagonal()
        precision, recall = ((right / table.sum(axis).clamp(min=1)).mean() for axis in (0, 1))
        found.append(float(2 * precision * recall / (precision + recall).clamp(min=1e-12)))
    return float(np.mean(found))


def unknown_measures(learner: Any, survey: Any, split: str) -> dict[str, float]:
    """Measure `open_set_f1`, and how well confidence separates known from unknown pictures, where a split has both.

    Args:
        learner: has an encoder and a classifier.
        survey: access to the split; pictures of no known class have the label -1.
        split: valid or test.
    """
    from sklearn.metrics import roc_auc_score

    labels = torch.from_numpy(np.asarray(survey.split(split).labels))
    if not (labels < 0).any() or not (labels >= 0).any():
        return {}
    probability = survey.over(
        split, lambda batch: learner.classifier(learner.encoder(batch["image"])).softmax(1)
    ).float()
    auroc = roc_auc_score((labels >= 0).numpy(), probability.amax(1).numpy())
    return {"open_f1": open_set_f1(probability, labels), "unknown_auroc": float(auroc)}
