"""BYOL: predict a slowly moving copy's embedding of one view from the other view; there are no negatives.

Grill, Strub, Altche, Tallec, Richemond, Buchatskaya, Doersch, Avila Pires, Guo, Gheshlaghi Azar, Piot, Kavukcuoglu, Munos,
Valko: "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020, arXiv 2006.07733.

The loss (Eq. 2) is `core.alignment.negative_cosine`: 2 + 2 D is the squared distance of unit vectors. Each view is
normalised over its own batch, and the loss sums the two directions. Not built: batch normalisation over all processes. Each
process normalises over its own share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from counterpoint.core.alignment import negative_cosine
from counterpoint.core.teacher import EMATeacher, cosine_momentum
from counterpoint.systems.base import System
from counterpoint.tasks.views import LAPTOP, ViewsConfig, ViewsLearner, mlp


@dataclass
class BYOLConfig(ViewsConfig):
    """Settings of BYOL. Defaults are the paper's for ImageNet (Sec. 3.3 and Appendix B)."""

    epochs: int = 1000
    batch_size: int = 4096
    recipe: str = "byol"
    optimizer: str = "lars"
    lr: float = 0.2
    weight_decay: float = 1.5e-6
    warmup_epochs: int = 10
    hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    projection: int = 256
    """Width of the outputs of projector and predictor."""
    momentum_teacher: float = 0.996
    """Momentum of the target network at the first step, 0 to 1; it rises to 1 on half a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("momentum_teacher")


class BYOL(ViewsLearner):
    """An online network with a predictor, and a target network that is its moving average."""

    def __init__(self, config: BYOLConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.predictor = mlp(config.projection, config.hidden, config.projection)
        self.teacher = EMATeacher(self.network)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        one, two = (self.predictor(self.network(view)) for view in batch["views"])
        target_one, target_two = (self.teacher(view) for view in batch["views"])
        return {"loss": 4 + 2 * negative_cosine(one, target_two) + 2 * negative_cosine(two, target_one)}

    def end_step(self) -> None:
        momentum = cosine_momentum(self.position.step, self.total_steps, self.config.momentum_teacher)
        self.teacher.update(self.network, momentum)


SYSTEM = System(
    slug="byol",
    task="views",
    config=BYOLConfig,
    learner=BYOL,
    data="cifar10",
    # The authors' code starts at 0.97 if it trains for only 40 epochs.
    recipe=LAPTOP | {"epochs": 20, "projection": 256, "momentum_teacher": 0.97},
)
