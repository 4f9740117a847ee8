"""DINO: a student predicts the centred, sharpened output of its own moving average on other crops.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin: "Emerging Properties in Self-Supervised Vision Transformers", ICCV
2021, arXiv 2104.14294.

`dino` computes the loss over crops (Eq. 3) and the moving centre (Eq. 4), whose mean covers all processes. The head, the schedules
and the settings are in tasks/self_distilled.py. A run keeps and measures the teacher, as in the paper.

Differences from the authors' code:

- The weight decay changes from epoch to epoch, like the teacher's temperature, not from step to step.
- The norm of all gradients together is clipped, not each parameter's.
- There is no stochastic depth.
- The learning rate ends at 0, not at 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.alignment import swapped_entropy
from counterpoint.core.checks import need_positive, need_rows, need_within, shapes
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.prototypes import moved_center
from counterpoint.core.world import over_group
from counterpoint.systems.base import System
from counterpoint.tasks.self_distilled import SelfDistilledConfig, SelfDistilledLearner
from counterpoint.tasks.views import LAPTOP


class DINOOutput(NamedTuple):
    loss: Float[Tensor, ""]
    center_after: Float[Tensor, " outcomes"]


@over_group
@full_precision(keep=("center",))
def dino(
    student: Float[Tensor, "crops n outcomes"],
    teacher: Float[Tensor, "global_crops n outcomes"],
    center: Float[Tensor, " outcomes"],
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    center_momentum: float = 0.9,
) -> DINOOutput:
    r"""Compute the cross-entropy of the student with the teacher, the mean over pairs of crops (Eq. 3).

    A pair is a global crop v of the teacher and another crop w of the student. Its cross-entropy is
    -sum_k q_v log softmax(s_w / student_temperature), with q_v = softmax((t_v - center) / teacher_temperature).

    Args:
        student: head outputs of all crops, the global crops first, in the teacher's order.
        teacher: head outputs of the global crops; no gradient.
        center: vector to subtract from the teacher's outputs.
        student_temperature, teacher_temperature: > 0, by default 0.1 and 0.04.
        center_momentum: m in center_after = m center + (1 - m) mean, 0 to 1, by default 0.9. The mean is that of the teacher's
            raw outputs over crops and batch (Eq. 4).

    Returns the loss and the centre for the next step. Raises ValueError for shapes that do not fit and for a single crop.
    Raises it too if the student has fewer crops than the teacher.

    >>> dino(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), torch.zeros(4)).loss
    tensor(1.3863)
    """
    if student.ndim != 3 or teacher.ndim != 3 or center.ndim != 1:
        raise ValueError(
            "student and teacher must be [crops, n, outcomes] and center [outcomes], got "
            + shapes(student=student, teacher=teacher, center=center)
        )
    if student.shape[1:] != teacher.shape[1:] or center.shape[0] != student.shape[2]:
        raise ValueError(f"n or outcomes differ: {shapes(student=student, teacher=teacher, center=center)}")
    need_positive(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    need_within(0, 1, center_momentum=center_momentum)
    if len(teacher):
        need_rows(teacher=teacher[0])
    raw = wide(teacher.detach())
    q = F.softmax((raw - center) / teacher_temperature, dim=-1)
    loss = swapped_entropy(q, wide(student) / student_temperature)
    return DINOOutput(loss, moved_center(center, raw.flatten(0, 1), center_momentum))


@dataclass
class DINOConfig(SelfDistilledConfig):
    """Settings of DINO. Defaults are the paper's for ViT-S/16 on ImageNet (Sec. 3.2 and Appendix C)."""

    encoder: str = "timm:vit_small_patch16_224"


class DINO(SelfDistilledLearner):
    """A student on all crops, and a teacher on the large crops, which is the student's moving average."""

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, views = self.config, batch["views"]
        teacher = self.teacher(torch.cat(views[: self.crops])).unflatten(0, (self.crops, -1))
        student = torch.stack(self.project(views))
        temperatures = config.student_temperature, self.teacher_temperature()
        out = dino(student, teacher, self.center, *temperatures, config.center_momentum)
        self.center.copy_(out.center_after)
        return {"loss": out.loss}


SYSTEM = System(
    slug="dino",
    task="views",
    config=DINOConfig,
    learner=DINO,
    data="cifar10",
    # As the authors' recipe for convolutional networks: SGD, constant weight decay, no warm-up of the temperature. The head
    # uses batch normalisation, as in lightly's runs on CIFAR-10. Without it the loss stays at log(projection) for epochs.
    recipe=LAPTOP
    | {
        "epochs": 12,
        "recipe": "dino-cifar",
        "local_crops": 4,
        "final_weight_decay": None,
        "bottleneck": 128,
        # Without it the loss did not fall. Test figures had been seen by then: see barlow_twins.py's recipe.
        "head_norm": True,
        "projection": 2048,
        "teacher_temperature": 0.04,
        "teacher_warmup": 0,
        "momentum_teacher": 0.99,
    },
)
