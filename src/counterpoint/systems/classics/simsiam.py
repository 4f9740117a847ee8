"""SimSiam: predict one view's projection from the other's; only the stop-gradient prevents collapse.

Chen, He: "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv 2011.10566.

The loss (Eqs. 1 to 4) is `core.alignment.negative_cosine`, in both directions, halved. Each view is normalised over its own
batch. Not built: batch normalisation over all processes. Each process normalises over its own share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from counterpoint.core.alignment import negative_cosine
from counterpoint.core.compared import Compared, predicted
from counterpoint.engine.stages import Turn
from counterpoint.systems.base import System
from counterpoint.systems.parts import ContrastiveLearner
from counterpoint.tasks.views import LAPTOP, ViewsConfig, ViewsLearner, mlp


@dataclass
class SimSiamConfig(ViewsConfig):
    """Settings of SimSiam. Defaults are the paper's for ImageNet (Sec. 3)."""

    epochs: int = 100
    batch_size: int = 512
    recipe: str = "moco-v2"
    optimizer: str = "momentum"
    lr: float = 0.05
    """Learning rate at a batch of 256, multiplied by batch_size / 256; the predictor's stays constant."""
    projection: int = 2048
    """Width of the outputs of projector and predictor, at least 1."""
    layers: int = 3
    """Number of layers of the projector, at least 1; 2 on CIFAR."""
    bottleneck: int = 512
    """Width of the predictor's hidden layer, at least 1."""

    counts: ClassVar[tuple[str, ...]] = (*ViewsConfig.counts, "layers", "bottleneck")


class SimSiam(ContrastiveLearner, ViewsLearner):
    """One network on two views, and a predictor that is applied to each view in turn."""

    def __init__(self, config: SimSiamConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.predictor = mlp(config.projection, config.bottleneck, config.projection)

    def build_projector(self, dim: int) -> nn.Module:
        return mlp(dim, *[self.config.hidden] * (self.config.layers - 1), self.config.projection, last_norm=True)

    def compared(self, batch: dict[str, Any]) -> list[Compared]:
        z1, z2 = (self.network(view) for view in batch["views"])
        return [Compared(z1, z2, predicted, index=batch["index"])]

    def objective(self, compared: Compared) -> dict[str, Tensor]:
        one, two = (negative_cosine(self.predictor(way.query), way.positive) for way in compared.directions())
        return {"loss": one / 2 + two / 2}

    def turns(self) -> list[Turn]:
        return [self.turn_of([self], constant=self.predictor.parameters())]


SYSTEM = System(
    slug="simsiam",
    task="views",
    config=SimSiamConfig,
    learner=SimSiam,
    data="cifar10",
    compares=predicted,
    # The paper's CIFAR settings (Appendix D: a projector of two layers, lr 0.03, weight decay 0.0005), narrower.
    recipe=LAPTOP
    | {"epochs": 20, "optimizer": "momentum", "lr": 0.03, "layers": 2, "projection": 512, "bottleneck": 128},
)
