"""Triplet loss on the hardest examples of a batch: the furthest of the same class, the nearest of another.

Hermans, Beyer, Leibe: "In Defense of the Triplet Loss for Person Re-Identification", arXiv 1703.07737, 2017.

Batch-hard mining (Eq. 5) in the form metric-learning libraries use: distances of unit vectors, the mean over the triplets
that still violate the margin. The paper's own (no normalisation, all triplets count, a soft margin as an option) is not here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.contrast import EPS, wide
from counterpoint.core.distributed import gather_rows


class TripletOutput(NamedTuple):
    loss: Float[Tensor, ""]
    anchors: Int[Tensor, " triplets"]
    positives: Int[Tensor, " triplets"]
    negatives: Int[Tensor, " triplets"]


def triplet_hard(embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"], margin: float = 0.2) -> TripletOutput:
    r"""Mean over violating anchors of relu( max over positives of D - min over negatives of D + margin ) (Eq. 5).

    Args:
        embeddings: normalised here; D is the Euclidean distance of the unit vectors.
        labels: class of each row.
        margin: by how much a negative is to be further away.

    Returns the loss and the hardest triplets, as row numbers (across processes: of the gathered batch), one for every
    anchor that has a positive and a negative. No violation, or no such anchor: the loss is 0. Raises ValueError for shapes
    that do not fit.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> triplet_hard(x, torch.tensor([0, 0, 1]), margin=0.5)[:3]
    (tensor(1.2071), tensor([0, 1]), tensor([1, 0]))
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings must be [n, dim] and labels [n], got {shapes(embeddings=embeddings, labels=labels)}"
        )
    need_rows(embeddings=embeddings)
    x = F.normalize(wide(gather_rows(embeddings)), dim=1, eps=EPS)
    labels = gather_rows(labels)
    with torch.no_grad():
        # Of unit vectors the most similar is the nearest. A NaN wins both searches, so it cannot go unseen.
        similarity = x @ x.T
        same = labels[:, None] == labels
        negative = similarity.masked_fill(same, -math.inf).argmax(1)
        alike = same.sum(1)  # itself included
        positive = similarity.masked_fill(~same.fill_diagonal_(False), math.inf).argmin(1)
        anchors = ((alike > 1) & (alike < len(labels))).nonzero().squeeze(1)
        positives, negatives = positive[anchors], negative[anchors]
    # Only the chosen distances carry gradient; that of a distance of 0 is 0.
    anchor = x[anchors]
    far = torch.linalg.vector_norm(anchor - x[positives], dim=1)
    near = torch.linalg.vector_norm(anchor - x[negatives], dim=1)
    losses = F.relu(far - near + margin)
    loss = losses.sum() / (losses > 0).sum().clamp(min=1) if len(anchors) else x.sum() * 0
    return TripletOutput(loss, anchors, positives, negatives)
