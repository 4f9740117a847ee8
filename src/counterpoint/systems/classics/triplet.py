"""Triplet loss on the hardest examples of a batch: the furthest of the same class and the nearest of another class.

Hermans, Beyer, Leibe: "In Defense of the Triplet Loss for Person Re-Identification", arXiv 1703.07737, 2017.

Batch-hard mining (Eq. 5) in the form of metric-learning libraries: distances of unit vectors, the mean over the triplets that
violate the margin. The paper's form is not built: no normalisation, the mean over all triplets, optionally a soft margin.
Batches are the paper's, P classes x K images (Sec. 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import gather_rows
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import need_fixed
from counterpoint.core.world import over_group
from counterpoint.systems.base import System
from counterpoint.tasks.images import ImageLearner
from counterpoint.tasks.labelled import LAPTOP, EmbeddingConfig
from counterpoint.tasks.views import mlp


class TripletOutput(NamedTuple):
    loss: Float[Tensor, ""]
    anchors: Int[Tensor, " triplets"]
    positives: Int[Tensor, " triplets"]
    negatives: Int[Tensor, " triplets"]


@over_group
@full_precision
def triplet_hard(embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"], margin: float = 0.2) -> TripletOutput:
    r"""Compute relu( max over positives of D - min over negatives of D + margin ), the mean over violating anchors (Eq. 5).

    Args:
        embeddings: rows, which this function normalises; D is the Euclidean distance of the unit vectors. For a row of zeros
            see `core.operands.unit`.
        labels: class of each row.
        margin: required difference between the distances to negative and positive, by default 0.2.

    Returns the loss and the hardest triplet of every anchor with a positive and a negative. Triplets are row numbers, across
    processes those of the gathered batch. Without a violation or such an anchor, the loss is 0. Raises ValueError for shapes
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
    x = unit(gather_rows(embeddings))
    need_fixed("triplet_hard", labels=labels)
    labels = gather_rows(labels)
    with torch.no_grad():
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b: the nearest has the largest value along a row, even with rows of zeros.
        # A NaN wins both searches, so it is always visible in the loss.
        similarity = x @ x.T + 0.5 * (x == 0).all(1)
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


@dataclass
class TripletConfig(EmbeddingConfig):
    """Settings of the triplet loss.

    Defaults are the paper's TriNet for person re-identification (Sec. 3.2), 25,000 steps on Market-1501. A cosine replaces
    the late exponential decay.
    """

    epochs: int = 140
    batch_size: int = 72
    images_per_class: int = 4
    pretrained: bool = True
    recipe: str = "supervised"
    hidden: int = 1024
    optimizer: str = "adam"
    lr: float = 1.07e-3
    """Learning rate at a batch of 256; it is multiplied by batch_size / 256 (3e-4 at the paper's batch)."""
    weight_decay: float = 0.0
    margin: float = 0.2
    """Required difference between the distances to images of another and of the same class, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("margin")


class Triplet(ImageLearner):
    """An encoder and a projector, whose output is the embedding to keep and evaluate."""

    def __init__(self, config: TripletConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.projector = mlp(self.encoder.dim, config.hidden, config.projection)

    def embed(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        (view,) = batch["views"]
        return {"loss": triplet_hard(self.embed(view), batch["label"], self.config.margin).loss}


SYSTEM = System(
    slug="triplet",
    task="labelled",
    config=TripletConfig,
    learner=Triplet,
    data="cifar10",
    recipe=LAPTOP
    | {
        "batch_size": 120,
        "images_per_class": 12,
        "pretrained": False,
        "recipe": "weak",
        "hidden": 256,
        "optimizer": "adam",
        "lr": 2e-3,
        "weight_decay": 0.0,
    },
)
