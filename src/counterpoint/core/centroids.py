"""Clustering around class centroids that begin as means weighted by a classifier's probabilities, or as prototypes.

The rounds are those of SHOT (arXiv 2002.08546, Sec. 3.2); prototypes and given labels are those of WSCoL (arXiv 2410.05557).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide


class Clustering(NamedTuple):
    """Result of a clustering: nearest centroids of k classes."""

    distance: Float[Tensor, "rows k"]
    label_set: Int[Tensor, " k"]  # class numbers of the columns
    labels: Int[Tensor, " rows"]  # class number of the nearest centroid


def _appended(rows: Tensor) -> Tensor:
    """Append a constant 1, and normalise."""
    return F.normalize(F.pad(wide(rows), (0, 1), value=1.0), dim=1, eps=1e-12)


def _class_sums(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sum the rows of each class; on a GPU as a product, whose order is fixed."""
    if rows.is_cuda:
        return torch.eye(classes, dtype=rows.dtype, device=rows.device)[labels].T @ rows
    return rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows)


@torch.no_grad()
def _clustered(
    features: Tensor,
    logits: Tensor,
    prototypes: Tensor | None,
    fg_index: Tensor,
    fg_labels: Tensor,
    steps: int,
    cosine: bool,
) -> Clustering:
    if features.ndim != 2 or logits.ndim != 2 or len(features) != len(logits):
        raise ValueError(
            f"features must be [rows, dim] and logits [rows, classes], got {shapes(features=features, logits=logits)}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if prototypes is not None and prototypes.shape != (logits.shape[1] - 1, features.shape[1]):
        raise ValueError(f"prototypes must be [classes - 1, dim], got {shapes(prototypes=prototypes)}")
    need_rows(features=features)
    classes = logits.shape[1]
    rows, affinity, labels = _appended(features), wide(logits).softmax(1).to(features.dtype), logits.argmax(1)
    for step in range(steps):
        number = labels.bincount(minlength=classes)
        label_set = number.nonzero()[:, 0]
        if step and len(label_set) == 1:
            break  # the distances of the last round stand
        if step:
            centroids = _class_sums(rows, labels, classes) / (1e-8 + number.to(rows.dtype))[:, None]
        elif prototypes is None:
            centroids = affinity.T @ rows / (1e-8 + affinity.sum(0))[:, None]
        else:
            background = affinity[:, -1]
            centroids = torch.cat([_appended(prototypes), (background @ rows / (1e-8 + background.sum()))[None]])
        kept, kept_set = centroids[label_set], label_set
        # [k, rows]: a product with few rows is faster than one with few columns.
        if cosine:
            near = unit(kept) @ unit(rows).T
        elif step == steps - 1:
            break  # the labels of the last round are those of its distances
        else:  # the order of the distances; their values are needed of the last round alone
            near = kept @ rows.T - torch.linalg.vecdot(kept, kept)[:, None] / 2
        labels = kept_set[near.argmax(0)]
        labels[fg_index] = fg_labels.to(labels.dtype)
    if cosine:
        distance = 1 - near.T
    else:
        a, b = kept.double(), rows.double()  # so that the expanded square keeps its digits
        square = torch.linalg.vecdot(a, a)[:, None] + torch.linalg.vecdot(b, b) - 2 * (a @ b.T)
        distance = square.clamp(min=0).sqrt().T.to(rows.dtype)
    return Clustering(distance, kept_set, kept_set[distance.argmin(1)])


@full_precision
def prototype_clustering(
    features: Float[Tensor, "rows dim"],
    logits: Float[Tensor, "rows classes"],
    prototypes: Float[Tensor, "foreground dim"] | None,
    fg_index: Int[Tensor, " fg"],
    fg_labels: Int[Tensor, " fg"],
    steps: int = 4,
    use_prototypes: bool = True,
) -> Clustering:
    """Cluster regions around centroids that begin as the class prototypes (Sec. 3.3).

    A constant 1 is appended to each row, which is normalised then. The first centroids are means weighted by softmax(logits);
    prototypes replace those of the foreground. Later ones are means of the rows with a label. Distances are Euclidean.

    Args:
        features: rows z of the weak views.
        logits: the teacher's; the last class is the background.
        prototypes: one for each class but the background; None: without prototypes.
        fg_index, fg_labels: rows whose label is given, and that label.
        steps: rounds, at least 1, by default 4.
        use_prototypes: False where not all classes have a prototype yet; they are ignored then.

    Only classes with a row keep a centroid. Rounds end early where one class is left. The labels are those of the last distances;
    given labels do not replace them. Raises ValueError for an empty batch, shapes that do not fit and steps below 1.

    >>> rows, no = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), torch.empty(0, dtype=torch.long)
    >>> prototype_clustering(rows, torch.eye(3)[:, :2], torch.tensor([[0.0, 1.0]]), no, no).labels
    tensor([1, 0, 0])
    """
    return _clustered(features, logits, prototypes if use_prototypes else None, fg_index, fg_labels, steps, False)


@full_precision
def plain_clustering(
    features: Float[Tensor, "rows dim"],
    logits: Float[Tensor, "rows classes"],
    fg_index: Int[Tensor, " fg"],
    fg_labels: Int[Tensor, " fg"],
    steps: int = 2,
) -> Clustering:
    """Cluster regions around weighted centroids, without prototypes and by cosine distance.

    Arguments and errors are those of `prototype_clustering`; steps are 2 by default.

    >>> rows, no = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), torch.empty(0, dtype=torch.long)
    >>> plain_clustering(rows, torch.eye(3)[:, :2], no, no).labels
    tensor([0, 1, 1])
    """
    return _clustered(features, logits, None, fg_index, fg_labels, steps, True)
