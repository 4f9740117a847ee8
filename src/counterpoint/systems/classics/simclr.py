"""SimCLR: two augmented views of an image are each other's positive, everything else in the batch is negative.

Chen, Kornblith, Norouzi, Hinton: "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
arXiv 2002.05709.

The loss (NT-Xent, Eq. 1) is `core.nt_xent`, on the kernel: one symmetric log-sum-exp of the 2n views, computed once for each
pair. The projector has batch normalisation, as in the authors' code; the paper's text does not mention it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from counterpoint.core.compared import Compared, views
from counterpoint.core.nt_xent import nt_xent
from counterpoint.systems.base import System
from counterpoint.systems.parts import ContrastiveLearner
from counterpoint.tasks.views import LAPTOP, ViewsConfig, ViewsLearner


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
    """Temperature of the loss, > 0; 0.5 on CIFAR."""
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
