"""Measure embeddings: functions of plain arrays (numpy's or torch's), from which the tasks build their evaluators.

    name             function              result
    retrieval        retrieval             recall at k, mean reciprocal rank and median rank of the right keys of queries
    identification   identification        wholes that queries were cut from, by the votes of the retrieved items
    zero-shot        zero_shot_accuracy    share of items whose class's prompt (or mean, `class_means`) is the nearest
    knn              knn_accuracy          share of items whose class their nearest neighbours vote for
    purity           purity                share of an item's neighbours that are of its own group, such as its domain
    linear-probe     linear_probe          accuracy of logistic regression on frozen features
    tags             tag_precision         mean average precision of a logistic regression for each of several labels
    gap              gap_metrics           distance between two modalities
    alignment, uniformity                  Wang and Isola's measures of one modality's features
    tolerance        tolerance             closeness of examples of one class

`EVALUATORS` holds them by name. `retrieval_chance` and `class_chance` compute the share of items that are right by chance.

Ties never favour a method. Among equally good keys, classes or groups, retrieval ranks the right one last. Every other
measure takes the expectation over a random choice among them. Equal embeddings score chance.

>>> import numpy as np
>>> retrieval(np.eye(3), np.eye(3))["r1"]
1.0
"""

from collections.abc import Callable
from typing import Any

from counterpoint.core.gap import gap_metrics
from counterpoint.tasks.measures.classes import (
    RocCounts,
    class_means,
    confusion,
    confusion_figure,
    confusion_of,
    decided,
    decided_shares,
    knn_accuracy,
    knn_votes,
    linear_probe,
    purity,
    tag_precision,
    zero_shot_accuracy,
)
from counterpoint.tasks.measures.geometry import (
    alignment,
    axes_figure,
    cosine_between_classes,
    gallery_rows,
    principal_axes,
    tolerance,
    uniformity,
)
from counterpoint.tasks.measures.retrieval import (
    RECALL,
    class_chance,
    identification,
    retrieval,
    retrieval_chance,
    retrieval_ranks,
    retrieval_recall,
)
from counterpoint.tasks.measures.tails import ClassMeans, means_by_class

EVALUATORS: dict[str, Callable[..., Any]] = {
    "retrieval": retrieval,
    "identification": identification,
    "zero-shot": zero_shot_accuracy,
    "knn": knn_accuracy,
    "purity": purity,
    "linear-probe": linear_probe,
    "tags": tag_precision,
    "gap": gap_metrics,
    "alignment": alignment,
    "uniformity": uniformity,
    "tolerance": tolerance,
}

__all__ = [
    "EVALUATORS",
    "RECALL",
    "ClassMeans",
    "RocCounts",
    "alignment",
    "axes_figure",
    "class_chance",
    "class_means",
    "confusion",
    "confusion_figure",
    "confusion_of",
    "cosine_between_classes",
    "decided",
    "decided_shares",
    "gallery_rows",
    "identification",
    "knn_accuracy",
    "knn_votes",
    "linear_probe",
    "means_by_class",
    "principal_axes",
    "purity",
    "retrieval",
    "retrieval_chance",
    "retrieval_ranks",
    "retrieval_recall",
    "tag_precision",
    "tolerance",
    "uniformity",
    "zero_shot_accuracy",
]
