"""Measures of embeddings: functions of plain arrays (numpy's or torch's), which the tasks' evaluators are made of.

    name             function              what it says
    retrieval        retrieval             recall at k, mean reciprocal rank and median rank of the right keys of queries
    identification   identification        what queries were cut from, by the votes of what they retrieve
    zero-shot        zero_shot_accuracy    share of items whose class's prompt (or mean, `class_means`) is the nearest
    knn              knn_accuracy          share of items whose class their nearest neighbours vote for
    linear-probe     linear_probe          accuracy of logistic regression on frozen features
    gap              gap_metrics           how far apart two modalities lie
    alignment, uniformity                  Wang and Isola's, of one modality's features
    tolerance        tolerance             how close together examples of one class lie

`EVALUATORS` has them by name. Of the share of items that are right by chance speak `retrieval_chance` and `class_chance`.

Ties never count for a method. Where several keys, classes or groups are equally good, retrieval ranks the right one last, and
every other measure takes the expectation over a random choice among them. Embeddings that are all alike score chance.

>>> import numpy as np
>>> retrieval(np.eye(3), np.eye(3))["r1"]
1.0
"""

from collections.abc import Callable
from typing import Any

from counterpoint.core.gap import gap_metrics
from counterpoint.tasks.measures.classes import (
    class_means,
    confusion,
    confusion_figure,
    confusion_of,
    decided,
    decided_shares,
    knn_accuracy,
    linear_probe,
    zero_shot_accuracy,
)
from counterpoint.tasks.measures.geometry import alignment, gallery_rows, principal_axes, tolerance, uniformity
from counterpoint.tasks.measures.retrieval import (
    RECALL,
    class_chance,
    identification,
    retrieval,
    retrieval_chance,
    retrieval_ranks,
    retrieval_recall,
)

EVALUATORS: dict[str, Callable[..., Any]] = {
    "retrieval": retrieval,
    "identification": identification,
    "zero-shot": zero_shot_accuracy,
    "knn": knn_accuracy,
    "linear-probe": linear_probe,
    "gap": gap_metrics,
    "alignment": alignment,
    "uniformity": uniformity,
    "tolerance": tolerance,
}

__all__ = [
    "EVALUATORS",
    "RECALL",
    "alignment",
    "class_chance",
    "class_means",
    "confusion",
    "confusion_figure",
    "confusion_of",
    "decided",
    "decided_shares",
    "gallery_rows",
    "identification",
    "knn_accuracy",
    "linear_probe",
    "principal_axes",
    "retrieval",
    "retrieval_chance",
    "retrieval_ranks",
    "retrieval_recall",
    "tolerance",
    "uniformity",
    "zero_shot_accuracy",
]
