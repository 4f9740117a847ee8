"""RKD: the student learns the distances and angles between the teacher's embeddings.

Park, Kim, Lu, Cho: "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068.

The losses (Eqs. 5 to 8) are `rkd_distance` and `rkd_angle`, on the vectors before the classifiers, whose widths may differ.
Not built: the paper's experiments on metric learning (a triplet loss together with RKD, or RKD alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import gather_rows
from counterpoint.core.operands import EPS, unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import once, traced
from counterpoint.core.world import over_group
from counterpoint.systems.base import System
from counterpoint.tasks.taught import LAPTOP, Seen, TaughtConfig, TaughtLearner

# Maximum number of entries of a block of an intermediate result, so that it stays in the cache.
BLOCK = 2**20


@over_group
@full_precision
def rkd_distance(student: Float[Tensor, "n dim"], teacher: Float[Tensor, "n teacher_dim"]) -> Float[Tensor, ""]:
    """Compute the mean over the n^2 pairs of Huber(d^s - d^t), d the Euclidean distance over the mean distance (Sec. 3.2.1).

    As in published code, squared distances are at least 1e-12: if all points of one side are equal, all its distances are
    equal. Points are centred first, so a common offset costs no precision. For one point, which has no pairs, the loss is 0.

    Args:
        student: the student's vectors.
        teacher: the teacher's vectors, of any width; no gradient.

    Raises ValueError for shapes that do not fit.

    >>> rkd_distance(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0], [0.0, 10.0]])).item() < 1e-9
    True
    """
    x, y = _gathered(student, teacher)
    if len(x) < 2:
        return x.sum() * 0
    return F.smooth_l1_loss(_relative_distances(x), _relative_distances(y))


def _gathered(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must be [n, dim] and [n, teacher_dim], got {shapes(student=student, teacher=teacher)}"
        )
    need_rows(student=student)
    return gather_rows(wide(student)), gather_rows(wide(teacher.detach()))


def _relative_distances(x: Tensor) -> Tensor:
    n = len(x)
    x = x - x.mean(0)
    square = x.square().sum(1)
    distance = torch.addmm(square[:, None] + square, x, x.T, alpha=-2).clamp(min=1e-12).sqrt()
    distance = distance.masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0.0)
    return distance * (n * (n - 1) / distance.sum())


class _AngleLoss(torch.autograd.Function):
    """The angle-wise loss with its gradient, computed block by block of anchors, so that no result has size n^3."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        n = len(student)
        step = max(1, BLOCK // (n * max(n, student.shape[1], teacher.shape[1])))
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student)
        total = student.new_zeros(())
        for start in range(0, n, step):
            anchors = slice(start, start + step)
            towards, length = _directions(student, anchors)
            difference = torch.bmm(towards, towards.mT)
            other = _directions(teacher, anchors)[0].to(student.dtype)
            difference.baddbmm_(other, other.mT, alpha=-1)
            slope = difference.clamp(-1, 1)
            # Huber(x) = c (x - c/2) with c = clamp(x, -1, 1), which is its derivative too.
            total += (slope * (difference - slope / 2)).sum()
            if wanted:
                # Each angle uses a direction twice and the slope is symmetric. Then differentiate the normalisation.
                pull = torch.bmm(slope, towards)
                pull = (pull - (pull * towards).sum(2, keepdim=True) * towards).mul_(2 / length)
                gradient += pull.sum(0)
                gradient[anchors] -= pull.sum(1)
        ctx.save_for_backward(gradient / n**3)
        return total / n**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


def _directions(x: Tensor, anchors: slice) -> tuple[Tensor, Tensor]:
    """Compute unit vectors from the anchors to all points [anchors, n, dim], 0 to themselves, and their former lengths."""
    towards = x - x[anchors, None]
    length = torch.linalg.vector_norm(towards, dim=2, keepdim=True).clamp_(min=EPS)
    return towards.div_(length), length


@over_group
@full_precision
def rkd_angle(student: Float[Tensor, "n dim"], teacher: Float[Tensor, "n teacher_dim"]) -> Float[Tensor, ""]:
    """Return the mean over the n^3 triplets of Huber(A^s - A^t) (Sec. 3.2.2).

    A_ijk is the cosine of the angle at i between j and k. It is 0 if j or k is i or coincides with it. The function computes
    the gradient in the same pass, block by block of anchors. Its memory is a few blocks of [anchors, n, n]. A second
    derivative raises RuntimeError. Inside torch.func and torch.compile the function holds all n^3 angles.

    Args:
        student: the student's vectors.
        teacher: the teacher's vectors, of any width; no gradient.

    Raises ValueError for shapes that do not fit.

    >>> rkd_angle(torch.eye(3), 2 * torch.eye(3)).item() < 1e-9
    True
    """
    x, y = _gathered(student, teacher)
    if traced():
        return _composed_angle_loss(x, y)
    return _AngleLoss.apply(once(x, "rkd_angle"), y)


def _composed_angle_loss(x: Tensor, y: Tensor) -> Tensor:
    """Compute the angle-wise loss with PyTorch's own operations, in memory n^3."""
    angles = []
    for points in (x, y):
        towards = unit(points - points[:, None])
        angles.append(towards @ towards.mT)
    return F.smooth_l1_loss(angles[0], angles[1])


class RKDOutput(NamedTuple):
    loss: Float[Tensor, ""]
    distance: Float[Tensor, ""]
    angle: Float[Tensor, ""]


@over_group
@full_precision
def rkd(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n teacher_dim"],
    w_distance: float = 25.0,
    w_angle: float = 50.0,
) -> RKDOutput:
    """Compute w_distance rkd_distance + w_angle rkd_angle, and the two losses.

    Args:
        student: the student's vectors.
        teacher: the teacher's vectors, of any width; no gradient.
        w_distance, w_angle: weights of the two losses, by default 25 and 50.

    >>> rkd(torch.eye(3), 2 * torch.eye(3)).loss.item() < 1e-6
    True
    """
    distance, angle = rkd_distance(student, teacher), rkd_angle(student, teacher)
    return RKDOutput(w_distance * distance + w_angle * angle, distance, angle)


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class RKDConfig(TaughtConfig):
    """Settings of RKD. Weights are the paper's for classification (Sec. 4.2), others come from CRD's comparison on CIFAR-100."""

    distance_weight: float = 25.0
    """Weight of the distances, at least 0."""
    angle_weight: float = 50.0
    """Weight of the angles, at least 0."""

    weights: ClassVar[tuple[str, ...]] = (*TaughtConfig.weights, "distance_weight", "angle_weight")


class RKD(TaughtLearner):
    """Cross-entropy and the relations within a batch."""

    def lesson(self, student: Seen, teacher: Seen, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "distance": self.config.distance_weight * rkd_distance(student.feature, teacher.feature),
            "angle": self.config.angle_weight * rkd_angle(student.feature, teacher.feature),
        }


SYSTEM = System(slug="rkd", task="labelled", config=RKDConfig, learner=RKD, data="cifar10", recipe=LAPTOP)
