"""KD: a student learns the softened outputs of a teacher.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", NIPS 2014 workshop, arXiv 1503.02531.

The loss is `counterpoint.core.distil.kd`, which most distillation methods add to theirs. Here the cross-entropy is the only
other term. `--kd-weight 0 --ce-weight 1 --teacher-epochs 0` trains the student without a teacher, the baseline of all
distillation methods. The paper's own experiments (MNIST, speech, JFT) are not built. The settings are those of CRD's comparison
on CIFAR-100.
"""

from __future__ import annotations

from dataclasses import dataclass

from counterpoint.systems.base import System
from counterpoint.tasks.taught import LAPTOP, TaughtConfig, TaughtLearner


@dataclass
class KDConfig(TaughtConfig):
    """Settings of KD. Defaults are those of CRD's comparison on CIFAR-100."""

    ce_weight: float = 0.1
    kd_weight: float = 0.9


SYSTEM = System(slug="kd", task="labelled", config=KDConfig, learner=TaughtLearner, data="cifar10", recipe=LAPTOP)
