"""SupCon: every example of the same class is a positive.

Khosla et al.: "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362.

The form with the mean over positives outside the logarithm (L_out, Eq. 2). Positives enter as class sums, so there is no
n x n mask. `supcon_single_view` is the form of metric-learning libraries: one vector per example, normalised inside.

The paper's second stage is a linear classifier on the frozen encoder. Here it is the task's linear probe at the end of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_rows
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean
from counterpoint.core.operands import class_similarity, scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Diagonal
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.images import ImageLearner
from counterpoint.tasks.labelled import LAPTOP, EmbeddingConfig


def _per_anchor(x: Tensor, labels: Tensor, ring: bool) -> tuple[Tensor, Tensor]:
    """Compute -(1/|P|) sum over positives of log-softmax, 0 without positives, and |P|.

    `x` holds unit rows divided by sqrt(temperature).
    """
    similarity, count = class_similarity(x, gather_rows(x), labels, gather_rows(labels))
    count = count - 1
    mean = (similarity - (x * x).sum(1)) / count.clamp(min=1)
    logs = batch_logsumexp(x, exclude=Diagonal(), ring=ring).rows
    return torch.where(count > 0, logs - mean, 0.0), count


@over_group
@full_precision
def supcon(
    features: Float[Tensor, "n views dim"],
    labels: Int[Tensor, " n"],
    temperature: float = 0.07,
    base_temperature: float = 0.07,
    all_views: bool = True,
    *,
    ring: bool = False,
) -> Float[Tensor, ""]:
    r"""Compute the supervised contrastive loss (Eq. 2), the mean over anchors i of

        -(temperature / base_temperature) (1/|P(i)|) sum_{p in P(i)} [ s_ip - log sum_{j != i} exp s_ij ].

    Args:
        features: unit vectors, which this function does not normalise. All views of all examples are contrasted with each
            other.
        labels: class of each example. An example's other views are positives too.
        temperature: > 0, by default 0.07; s is the dot product divided by it.
        base_temperature: > 0, by default 0.07; the loss has the factor temperature / base_temperature, as in the authors' code.
        all_views: True (default): all views are anchors; False: only the first ("one" in the authors' code).
        ring: across processes, pass keys round instead of gathering them; by default gather.

    An anchor without a positive has loss 0. Raises ValueError for shapes that do not fit, an empty batch and a temperature
    that is not positive and finite.

    >>> supcon(torch.eye(2)[:, None].expand(2, 2, 2), torch.tensor([0, 1]), temperature=1.0, base_temperature=1.0)
    tensor(0.5514)
    """
    if features.ndim != 3 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must be [n, views, dim] and labels [n], got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    need_rows(features=features)
    need_positive(temperature=temperature, base_temperature=base_temperature)
    views = features.shape[1]
    x = scaled(features.transpose(0, 1).flatten(0, 1), temperature**0.5)
    losses, _ = _per_anchor(x, labels.repeat(views), ring)
    return temperature / base_temperature * global_mean(losses if all_views else losses[: len(labels)])


@over_group
@full_precision
def supcon_single_view(
    embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"], temperature: float = 0.1, *, ring: bool = False
) -> Float[Tensor, ""]:
    """Compute SupCon with one vector per example: the mean over anchors whose loss is not 0, or 0 if there are none.

    Args:
        embeddings: one row per example, which this function normalises.
        labels: class of each row.
        temperature: > 0, by default 0.1.
        ring: across processes, pass keys round instead of gathering them; by default gather.

    >>> supcon_single_view(torch.eye(2), torch.tensor([0, 1]))
    tensor(0.)
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings must be [n, dim] and labels [n], got {tuple(embeddings.shape)}, {tuple(labels.shape)}"
        )
    need_rows(embeddings=embeddings)
    need_positive(temperature=temperature)
    x = scaled(unit(embeddings), temperature**0.5)
    losses, _ = _per_anchor(x, labels, ring)
    counted = (losses.detach() != 0).to(losses.dtype)  # NaN counts
    return global_mean(losses) / global_mean(counted).clamp(min=torch.finfo(losses.dtype).tiny).detach()


@dataclass
class SupConConfig(EmbeddingConfig):
    """Settings of SupCon. Defaults are those of the published code for CIFAR; Sec. 4.2 has larger ones for ImageNet."""

    epochs: int = 1000
    batch_size: int = 1024
    recipe: str = "supcon"
    lr: float = 0.125
    """Learning rate at a batch of 256; it is multiplied by batch_size / 256."""
    warmup_epochs: int = 10
    temperature: float = 0.1
    """Temperature of the loss, > 0."""
    base_temperature: float = 0.07
    """The loss is multiplied by temperature / base_temperature; > 0."""
    all_views: bool = True
    """Use both views of an image as anchors; False: only the first."""
    ring: bool = False
    """Across processes, pass keys round instead of gathering them, so that no process holds all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.temperature > 0 and self.base_temperature > 0):
            raise CounterpointError(
                f"temperature and base_temperature must be > 0, got {self.temperature} and {self.base_temperature}"
            )


class SupCon(ImageLearner):
    """Contrast of two views; all views of a class are positives."""

    crops: ClassVar[int] = 2

    def __init__(self, config: SupConConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        # As in the published code, one hidden layer without batch normalisation.
        self.projector = nn.Sequential(
            nn.Linear(self.encoder.dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.projection)
        )

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, views = self.config, batch["views"]
        projected = unit(self.projector(self.encoder(torch.cat(views))))
        features = torch.stack(projected.chunk(len(views)), dim=1)
        temperatures = config.temperature, config.base_temperature
        return {"loss": supcon(features, batch["label"], *temperatures, config.all_views, ring=config.ring)}


SYSTEM = System(
    slug="supcon",
    task="labelled",
    config=SupConConfig,
    learner=SupCon,
    data="cifar10",
    recipe=LAPTOP | {"batch_size": 256, "hidden": 512, "epochs": 18, "lr": 0.125},
)
