"""SimCLR: two augmented views of an image are each other's positive, everything else in the batch is negative.

Chen, Kornblith, Norouzi, Hinton: "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
arXiv 2002.05709.

The loss (NT-Xent, Eq. 1), on the kernel: one symmetric log-sum-exp of the 2n views, computed once for each pair. The
projector has batch normalisation, as in the authors' code; the paper's text does not mention it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive
from counterpoint.core.compared import Compared, views
from counterpoint.core.distributed import batch_logsumexp, global_mean
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Diagonal
from counterpoint.core.world import over_group
from counterpoint.systems.base import System
from counterpoint.systems.parts import ContrastiveLearner
from counterpoint.tasks.views import LAPTOP, ViewsConfig, ViewsLearner


@over_group
@full_precision
def nt_xent(
    z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"], temperature: float | Tensor = 0.5, *, ring: bool = False
) -> Float[Tensor, ""]:
    r"""Compute normalised-temperature cross-entropy: the mean over 2n views i of -s_{i,pos(i)} + log sum_{j != i} exp s_ij.

    Args:
        z1, z2: projections of the two views, row by row, which this function normalises.
        temperature: > 0, by default 0.5; s is the cosine divided by it.
        ring: across processes, pass keys round instead of gathering them; by default gather.

    Across processes, negatives come from all processes. One image alone has no negatives, and its loss is 0. Raises
    ValueError for different shapes or types, an empty batch and a temperature that is not positive and finite. Source: Eq. 1.

    >>> nt_xent(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.9048)
    """
    need_alike("n dim", z1=z1, z2=z2)
    need_positive(temperature=temperature)
    x = scaled(unit(torch.cat([z1, z2])), temperature**0.5)
    positive = positive_similarity(*x.chunk(2))
    return global_mean(batch_logsumexp(x, exclude=Diagonal(), ring=ring).rows) - global_mean(positive)


@dataclass
class SimCLRConfig(ViewsConfig):
    """Settings of SimCLR. Defaults are the paper's for ImageNet (Sec. 2.2 and Appendix B)."""

    epochs: int = 1000
    batch_size: int = 4096
    optimizer: str = "lars"
    lr: float = 0.3
    weight_decay: float = 1e-6
    warmup_epochs: int = 10
    temperature: float = 0.1
    """Temperature of the loss; 0.5 on CIFAR."""
    ring: bool = False
    """Across processes, pass keys round instead of gathering them, so that no process holds all."""


class SimCLR(ContrastiveLearner, ViewsLearner):
    """Contrast of two views."""

    def compared(self, batch: dict[str, Any]) -> list[Compared]:
        z1, z2 = self.project(batch["views"])
        return [Compared(z1, z2, views, self.config.temperature, batch["index"])]

    def objective(self, compared: Compared) -> dict[str, Tensor]:
        return {"loss": nt_xent(compared.query, compared.key, compared.temperature, ring=self.config.ring)}


SYSTEM = System(
    slug="simclr",
    task="views",
    config=SimCLRConfig,
    learner=SimCLR,
    data="cifar10",
    compares=views,
    recipe=LAPTOP | {"temperature": 0.5},
)
