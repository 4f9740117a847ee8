"""DINO: a student predicts the centred, sharpened output of its own moving average on other crops.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin: "Emerging Properties in Self-Supervised Vision Transformers", ICCV
2021, arXiv 2104.14294.

The loss over crops (Eq. 3) and the moving centre (Eq. 4), whose mean is taken over all processes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.alignment import swapped_entropy
from counterpoint.core.checks import need_positive, need_rows, need_within, shapes
from counterpoint.core.contrast import wide
from counterpoint.core.distributed import gather_rows


class DINOOutput(NamedTuple):
    loss: Float[Tensor, ""]
    center_after: Float[Tensor, " outcomes"]


def dino(
    student: Float[Tensor, "crops n outcomes"],
    teacher: Float[Tensor, "global_crops n outcomes"],
    center: Float[Tensor, " outcomes"],
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    center_momentum: float = 0.9,
) -> DINOOutput:
    r"""Mean over global crops v and all other crops w of -sum_k q_v log softmax(s_w / student_temperature) (Eq. 3),
    q_v = softmax((t_v - center) / teacher_temperature).

    Args:
        student: head outputs of all crops, the global ones first, in the teacher's order.
        teacher: head outputs of the global crops; no gradient.
        center: subtracted from the teacher's outputs.
        student_temperature, teacher_temperature: > 0.
        center_momentum: m of center_after = m center + (1 - m) mean of the teacher's raw outputs over crops and batch (Eq. 4).

    Returns the loss and the centre for the next step. Raises ValueError for shapes that do not fit, for fewer crops of the
    student's than of the teacher's and for a single crop.

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
    rows = gather_rows(torch.tensor([raw.shape[1]], device=raw.device)).sum()
    mean = gather_rows(raw.mean(0).sum(0, keepdim=True)).sum(0) / rows
    return DINOOutput(loss, center.detach().lerp(mean.to(center.dtype), 1 - center_momentum))
