"""MoCo: contrast with a queue of keys from a slowly moving copy of the encoder.

He, Fan, Wu, Xie, Girshick: "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, arXiv
1911.05722 (v1); Chen, Fan, Girshick, He: "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297 (v2).

This file has both versions: v2 is v1 with a hidden layer in the head, stronger views, a cosine schedule and temperature 0.2.

Not built:

- Shuffling images between processes before the key encoder's batch normalisation. Each process normalises over its own keys,
  so the statistics may reveal which key belongs to which query.
- v1's decay of the learning rate in steps. Here it follows a cosine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_rows
from counterpoint.core.compared import Compared, Queued
from counterpoint.core.contrast import pair_logsumexp, softplus
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.memory import Queue
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.teacher import EMATeacher
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.systems.parts import ContrastiveLearner
from counterpoint.tasks.views import LAPTOP, ViewsConfig, ViewsLearner, mlp


class MoCoOutput(NamedTuple):
    loss: Float[Tensor, ""]
    queue_after: Float[Tensor, "keys dim"]


@over_group
@full_precision(keep=("queue",))
def moco(
    query: Float[Tensor, "n dim"],
    key: Float[Tensor, "n dim"],
    queue: Float[Tensor, "keys dim"],
    temperature: float | Tensor = 0.07,
) -> MoCoOutput:
    r"""Compute InfoNCE of queries with their keys against a queue (v1, Eq. 1).

    With s the cosine divided by the temperature, it is the mean over i of

        -s(q_i, k_i) + log( exp s(q_i, k_i) + sum_m exp s(q_i, Q_m) )

    Args:
        query: rows of the trained network, which this function normalises.
        key: rows of the momentum network, which this function normalises; no gradient.
        queue: older keys, unit rows, without this batch's keys; no gradient.
        temperature: > 0, by default 0.07.

    Returns the loss and the updated queue, a first-in-first-out queue whose oldest row is the first. The new keys replace its
    first n rows. `core.memory.Queue` keeps the position to write at over many steps.
    Raises ValueError for different shapes or types, an empty batch and a temperature that is not positive and finite.

    >>> moco(torch.eye(2), torch.eye(2), torch.eye(2)).loss.item() > 0.6
    True
    """
    if query.shape != key.shape or query.ndim != 2 or queue.ndim != 2 or queue.shape[1] != query.shape[1]:
        raise ValueError(
            f"query and key must be [n, dim] alike and queue [keys, dim], got {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(queue.shape)}"
        )
    need_rows(query=query)
    need_positive(temperature=temperature)
    key = unit(key.detach())
    q = scaled(unit(query), temperature)
    positive = positive_similarity(q, key)
    negative = pair_logsumexp(q, queue.detach().to(q.dtype)).rows
    new = gather_rows(key)[: len(queue)]
    return MoCoOutput(global_mean(softplus(negative - positive)), torch.cat([new.to(queue.dtype), queue[len(new) :]]))


@dataclass
class MoCoConfig(ViewsConfig):
    """Settings of MoCo v1. Defaults are the paper's for ImageNet (Sec. 3.3 and 4)."""

    recipe: str = "moco-v1"
    hidden: int = 2048
    """Width of the head's hidden layer (v2 only), at least 1."""
    temperature: float = 0.07
    """Temperature of the loss, > 0."""
    queue: int = 65536
    """Number of keys of earlier batches to contrast with, at least batch_size."""
    momentum_teacher: float = 0.999
    """Momentum of the key network at each step, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("momentum_teacher")
        if self.queue < self.batch_size:
            raise CounterpointError(f"queue ({self.queue}) must not be smaller than batch_size ({self.batch_size})")


@dataclass
class MoCoV2Config(MoCoConfig):
    """Settings of MoCo v2. Defaults are the paper's for ImageNet."""

    recipe: str = "moco-v2"
    temperature: float = 0.2
    """Temperature of the loss, > 0."""


class MoCo(ContrastiveLearner, ViewsLearner):
    """A query network, a key network that is its moving average, and a queue of keys."""

    def __init__(self, config: MoCoConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.teacher = EMATeacher(self.network)
        # It stores the image of each key, for parts that exclude an image's own older keys.
        self.queue = Queue(config.queue, config.projection, seed=seed, owned=True)

    def build_projector(self, dim: int) -> nn.Module:
        return nn.Linear(dim, self.config.projection)

    def compared(self, batch: dict[str, Any]) -> list[Compared]:
        one, two = batch["views"]
        # Update the key network before using it, as in the authors' code.
        self.teacher.update(self.network, self.config.momentum_teacher)
        key = self.teacher(two)
        (query,) = self.project([one])
        queued = Queued(self.queue.read(), self.queue.owner.clone())
        return [Compared(query, key, queued, self.config.temperature, batch["index"])]

    def objective(self, compared: Compared) -> dict[str, Tensor]:
        assert isinstance(compared.ways, Queued)
        return {"loss": moco(compared.query, compared.key, compared.ways.queue, compared.temperature).loss}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        (compared,) = self.compared(batch)
        found = self.contrast(compared, batch)
        self.queue.write(compared.key, batch["index"])
        return found


class MoCoV2(MoCo):
    """MoCo with a hidden layer in the head."""

    def build_projector(self, dim: int) -> nn.Module:
        return mlp(dim, self.config.hidden, self.config.projection)


_LAPTOP = LAPTOP | {"queue": 4096, "momentum_teacher": 0.99, "temperature": 0.1}
V1 = System(
    slug="moco-v1", task="views", config=MoCoConfig, learner=MoCo, data="cifar10", recipe=_LAPTOP, compares=Queued
)
V2 = System(
    slug="moco-v2", task="views", config=MoCoV2Config, learner=MoCoV2, data="cifar10", recipe=_LAPTOP, compares=Queued
)
