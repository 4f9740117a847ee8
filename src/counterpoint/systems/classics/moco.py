"""MoCo: contrast against a queue of keys that a slowly moving copy of the encoder made.

He, Fan, Wu, Xie, Girshick: "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, arXiv
1911.05722 (v1); Chen, Fan, Girshick, He: "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297 (v2).

Both versions are here: v2 is v1 with a hidden layer in the head, stronger views, a cosine schedule and temperature 0.2.
Left out: shuffling images between processes before the key encoder's batch normalisation (each process normalises over its
own keys, which may leak which key is whose), and v1's steps of the learning rate (it falls on a cosine here).
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
    r"""InfoNCE of a query with its key against a queue (v1, Eq. 1): mean_i of -s(q_i, k_i) + log( exp s(q_i, k_i) + sum_m
    exp s(q_i, Q_m) ), s the cosine divided by the temperature.

    Args:
        query: from the network that learns; normalised here.
        key: from the momentum network; normalised here, no gradient.
        queue: older keys, unit rows, no gradient. It is read as it is: this batch's keys are not among them.
        temperature: > 0.

    Raises ValueError for shapes or types that differ, an empty batch and a temperature that is not positive and finite.
    Returns the loss and the queue as a first-in-first-out queue whose oldest row is the first would be afterwards: the
    keys written over its first n rows. `core.memory.Queue` keeps the place to write at over many steps.

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
    """Width of the head's hidden layer (v2 only)."""
    temperature: float = 0.07
    """Temperature of the loss."""
    queue: int = 65536
    """Keys of earlier batches to contrast with."""
    momentum_teacher: float = 0.999
    """How much of the key network stays at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue < self.batch_size:
            raise CounterpointError(f"the queue ({self.queue}) must hold at least a batch ({self.batch_size})")


@dataclass
class MoCoV2Config(MoCoConfig):
    """Settings of MoCo v2. Defaults are the paper's for ImageNet."""

    recipe: str = "moco-v2"
    temperature: float = 0.2
    """Temperature of the loss."""


class MoCo(ContrastiveLearner, ViewsLearner):
    """A query network that learns, a key network that follows, a queue of keys."""

    def __init__(self, config: MoCoConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.teacher = EMATeacher(self.network)
        # It remembers whose keys it holds, for parts that leave out an image's own older keys.
        self.queue = Queue(config.queue, config.projection, seed=seed, owned=True)

    def build_projector(self, dim: int) -> nn.Module:
        return nn.Linear(dim, self.config.projection)

    def compared(self, batch: dict[str, Any]) -> list[Compared]:
        one, two = batch["views"]
        # The key network moves before it is asked, as in the authors' code.
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
    """The same with a hidden layer in the head."""

    def build_projector(self, dim: int) -> nn.Module:
        return mlp(dim, self.config.hidden, self.config.projection)


_LAPTOP = LAPTOP | {"queue": 4096, "momentum_teacher": 0.99, "temperature": 0.1}
V1 = System(
    slug="moco-v1", task="views", config=MoCoConfig, learner=MoCo, data="cifar10", recipe=_LAPTOP, compares=Queued
)
V2 = System(
    slug="moco-v2", task="views", config=MoCoV2Config, learner=MoCoV2, data="cifar10", recipe=_LAPTOP, compares=Queued
)
