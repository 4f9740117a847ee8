"""FitNets: a layer of the student is to give, after a small regressor, what a layer of the teacher gives.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio: "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550.

The hint loss (Eq. 3) is `counterpoint.core.distil.feature_mse`, the regressor `hint_regressor`. Hint and cross-entropy are
minimised together, as later comparisons do; the paper's two stages (the hint alone for the student's lower layers, then KD)
are not here. `--kd-weight` adds the paper's second stage to the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from counterpoint.core.distil import feature_mse, hint_regressor
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.taught import LAPTOP, Seen, TaughtConfig, TaughtLearner


@dataclass
class FitNetsConfig(TaughtConfig):
    """Settings of FitNets. Defaults are those of CRD's comparison on CIFAR-100."""

    weight: float = 100.0
    """Weight of the hint."""
    guided: str = "layer2"
    """The student's layer that is guided; of a wrapped library model, as the library names it."""
    hint: str = "layer2"
    """The teacher's layer that gives the hint."""

    weights: ClassVar[tuple[str, ...]] = (*TaughtConfig.weights, "weight")


class FitNets(TaughtLearner):
    """Cross-entropy and one hint."""

    def __init__(self, config: FitNetsConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        (student,), (teacher,) = self.shapes()
        try:
            self.regressor = hint_regressor(student, teacher)
        except ValueError as error:
            raise CounterpointError(
                f"the student's {config.guided} cannot be guided by the teacher's {config.hint}: {error}"
            ) from error

    def layers(self) -> tuple[list[str], list[str]]:
        return [self.config.guided], [self.config.hint]

    def lesson(self, student: Seen, teacher: Seen, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"hint": self.config.weight * feature_mse(self.regressor(student.maps[0]), teacher.maps[0])}


SYSTEM = System(
    slug="fitnets",
    task="labelled",
    config=FitNetsConfig,
    learner=FitNets,
    data="cifar10",
    recipe=LAPTOP | {"guided": "layer1", "hint": "layer2"},
)
