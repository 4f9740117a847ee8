"""RKD: the student's embeddings are to lie towards each other as the teacher's do, in distances and in angles.

Park, Kim, Lu, Cho: "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068.

The losses (Eqs. 5 to 8) are `counterpoint.core.distil.rkd_distance` and `rkd_angle`, of the vectors before the classifiers,
whose widths may differ. The paper's experiments on metric learning (a triplet loss beside RKD, or RKD alone) are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from counterpoint.core.distil import rkd_angle, rkd_distance
from counterpoint.systems.base import System
from counterpoint.tasks.taught import LAPTOP, Seen, TaughtConfig, TaughtLearner


@dataclass
class RKDConfig(TaughtConfig):
    """Settings of RKD. Weights are the paper's for classification (Sec. 4.2), the rest is CRD's comparison on CIFAR-100."""

    distance_weight: float = 25.0
    """Weight of the distances."""
    angle_weight: float = 50.0
    """Weight of the angles."""

    weights: ClassVar[tuple[str, ...]] = (*TaughtConfig.weights, "distance_weight", "angle_weight")


class RKD(TaughtLearner):
    """Cross-entropy and the relations within a batch."""

    def lesson(self, student: Seen, teacher: Seen, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "distance": self.config.distance_weight * rkd_distance(student.feature, teacher.feature),
            "angle": self.config.angle_weight * rkd_angle(student.feature, teacher.feature),
        }


SYSTEM = System(slug="rkd", task="labelled", config=RKDConfig, learner=RKD, data="cifar10", recipe=LAPTOP)
