"""Distillation of softened outputs: of two classifiers (also both ways, R-Drop), and of similarities with prototypes (MulKI)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, need_rows, need_scale, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision, scalar, wide
from counterpoint.core.transforms import traced
from counterpoint.core.world import over_group


class _SoftDivergences(torch.autograd.Function):
    """Temperature^2 KL of each row of softened outputs, with a gradient of one pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        log_q, log_p = ((x / temperature).log_softmax(1) for x in (student, teacher))
        p, q = log_p.exp(), log_q.exp()
        # A class of teacher probability 0 adds nothing, also where its logit is -inf.
        gap = log_p.sub_(log_q).clamp_(min=torch.finfo(p.dtype).min)
        ctx.save_for_backward(student, teacher, q.sub_(p))
        ctx.temperature = temperature
        return torch.linalg.vecdot(p, gap).mul_(temperature**2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, difference = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more: in terms of the student
            again = _composed(student, teacher, ctx.temperature)
            return torch.autograd.grad(again, student, gradients, create_graph=True)[0], None, None
        return difference * (gradients[0] * ctx.temperature)[:, None], None, None


def _composed(student: Tensor, teacher: Tensor, temperature: float) -> Float[Tensor, " n"]:
    own = F.log_softmax(student / temperature, dim=1)
    rows = F.kl_div(own, F.softmax(teacher.detach() / temperature, dim=1), reduction="none").sum(1)
    return temperature**2 * rows


class _SoftEntropies(torch.autograd.Function):
    """Cross-entropy of each row of a student under a teacher's probabilities, with a gradient of one pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        own, p = student.log_softmax(1), teacher.softmax(1)
        p.masked_fill_(own == -torch.inf, 0)
        own.clamp_(min=torch.finfo(own.dtype).min)
        ctx.save_for_backward(student, teacher, own, p)
        return -torch.linalg.vecdot(p, own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        student, teacher, own, p = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more: in terms of the student
            again = _soft_entropies(student, teacher)
            return torch.autograd.grad(again, student, gradients, create_graph=True)[0], None
        return own.exp().mul_(p.sum(1, keepdim=True)).sub_(p).mul_(gradients[0][:, None]), None


def _soft_entropies(student: Tensor, teacher: Tensor) -> Float[Tensor, " n"]:
    own = student.log_softmax(1)
    return -(teacher.softmax(1) * own).masked_fill(own.detach() == -torch.inf, 0).sum(1)


def soft_cross_entropies(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"]
) -> Float[Tensor, " n"]:
    """Compute the cross-entropy of each row of logits under the teacher's probabilities; the teacher's get no gradient.

    Classes to which the student gives probability 0 do not count.
    """
    rows = _soft_entropies if traced() else _SoftEntropies.apply
    found: Tensor = rows(student, teacher.detach())
    return found


@over_group
@full_precision
def kd(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], temperature: float = 4.0
) -> Float[Tensor, ""]:
    """Compute temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature)), the batch's mean (Sec. 2).

    Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        student, teacher: logits; the teacher's get no gradient.
        temperature: > 0; its square keeps the size of the gradients.

    Raises ValueError for shapes that differ and for an empty batch.

    >>> kd(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.0]]), temperature=1.0)
    tensor(0.6031)
    """
    need_alike("n classes", student=student, teacher=teacher)
    need_positive(temperature=temperature)
    rows = _composed if traced() or isinstance(temperature, Tensor) else _SoftDivergences.apply
    return global_mean(rows(wide(student), wide(teacher), temperature))


@over_group
@full_precision
def relational_distillation(
    student_rows: Float[Tensor, "rows dim"],
    teacher_rows: Float[Tensor, "rows dim"],
    prototypes: Float[Tensor, "classes dim"],
    logit_scale: float | Float[Tensor, ""],
    temperature: float = 2.0,
) -> Float[Tensor, " rows"]:
    r"""Compute KL(R(teacher row, prototypes) || R(student row, prototypes)) of each row (MulKI, step 2).

    Args:
        student_rows, teacher_rows: rows as they are, usually unit rows.
        prototypes: one row for each class, which both are compared with; no gradient.
        logit_scale: s, 1 / temperature of the logits, at least 0.
        temperature: T, > 0, by default 2.

    The teacher gets no gradient. With one class it is 0. A row's result depends on this row alone. Times temperature^2 it is ZSCL's
    distillation without the teacher's entropy. Raises ValueError for shapes that do not fit, and for no row or no class.

    >>> relational_distillation(torch.eye(2), torch.eye(2), torch.eye(2), 20.0)
    tensor([0., 0.])
    """
    if student_rows.ndim != 2 or student_rows.shape != teacher_rows.shape:
        said = shapes(student_rows=student_rows, teacher_rows=teacher_rows)
        raise ValueError(f"student_rows and teacher_rows must be [rows, dim] alike, got {said}")
    if prototypes.ndim != 2 or prototypes.shape[1] != student_rows.shape[1]:
        raise ValueError(f"prototypes must be [classes, {student_rows.shape[1]}], got {list(prototypes.shape)}")
    need_rows(student_rows=student_rows, prototypes=prototypes)
    need_scale(logit_scale=logit_scale)
    need_positive(temperature=temperature)
    student, teacher, bank = wide(student_rows), wide(teacher_rows.detach()), wide(prototypes.detach())
    return softened_divergences(student @ bank.T, teacher @ bank.T, scalar(logit_scale, student) / temperature)


def softened_divergences(
    new: Float[Tensor, "rows classes"], old: Float[Tensor, "rows classes"], factor: Float[Tensor, ""]
) -> Float[Tensor, " rows"]:
    """Compute KL(softmax of factor old || softmax of factor new) of each row of similarities."""
    mine, wanted = (factor * new).log_softmax(1), (factor * old).log_softmax(1)
    return F.kl_div(mine, wanted, reduction="none", log_target=True).sum(1)


@over_group
@full_precision
def r_drop(logits_1: Float[Tensor, "n classes"], logits_2: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    r"""Compute R-Drop of two passes with different dropout: the mean of (KL(p||q) + KL(q||p)) / 2.

    Args:
        logits_1, logits_2: logits of the passes; p and q are their softmax. Both have a gradient.

    Equal logits give 0. Raises ValueError for shapes that do not fit and an empty batch. Source: arXiv 2106.14448.

    >>> r_drop(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor(0.)
    """
    need_alike("n classes", logits_1=logits_1, logits_2=logits_2)
    log_p, log_q = logits_1.log_softmax(1), logits_2.log_softmax(1)
    return global_mean(((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1) / 2)
