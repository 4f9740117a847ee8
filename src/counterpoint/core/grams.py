"""Compare sets of vectors by their Gram matrices, whose rows are normalised: which vectors are similar to which."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import gather_rows
from counterpoint.core.operands import EPS
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import once, traced
from counterpoint.core.world import over_group

BLOCK = 2**22  # maximum number of entries of the blocks of a Gram matrix


def gram_distance(
    student: Float[Tensor, "sets rows dim"],
    teacher: Float[Tensor, "sets rows teacher_dim"],
    what: str = "gram_distance",
) -> Float[Tensor, " sets"]:
    """Sum the squared differences of two Gram matrices with rows of length 1, for each set of vectors.

    The function computes the gradient in the same pass, block by block. Its memory is a few blocks, never [rows, rows].
    Inside torch.func and torch.compile it holds whole matrices. A row of zeros stays 0.

    Args:
        student: sets of vectors.
        teacher: the same number of vectors, of any width; no gradient.
        what: name of the public function, for the message that refuses a second derivative.

    >>> gram_distance(torch.eye(2)[None], torch.ones(1, 2, 3))
    tensor([1.1716])
    """
    teacher = teacher.detach()
    if traced():
        found = [F.normalize(x @ x.mT, dim=2, eps=EPS) for x in (student, teacher)]
        return (found[0] - found[1]).square().sum((1, 2))
    return _GramDistance.apply(once(student, what), teacher)


@over_group
@full_precision
def relation_distance(feat_teacher: Float[Tensor, "n ..."], feat_student: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Compute D_rel: the mean over n^2 pairs of squared differences of two Gram matrices with rows of length 1.

    Memory is linear in n. Scaling either side, or rotating its rows, changes nothing. A row of zeros stays 0.

    Args:
        feat_teacher: features or maps of any shape; no gradient.
        feat_student: features or maps of any shape, of the same images.

    Raises ValueError for different numbers of images, and for an empty batch.

    >>> relation_distance(torch.eye(2), torch.ones(2, 3))
    tensor(0.2929)
    """
    if feat_teacher.ndim < 2 or feat_student.ndim < 2 or len(feat_teacher) != len(feat_student):
        said = shapes(feat_teacher=feat_teacher, feat_student=feat_student)
        raise ValueError(f"feat_teacher and feat_student must be [n, ...] of the same images, got {said}")
    need_rows(feat_student=feat_student)
    student, teacher = (gather_rows(wide(x).flatten(1)) for x in (feat_student, feat_teacher.detach()))
    return gram_distance(student[None], teacher[None], "relation_distance").sum() / len(student) ** 2


def _normalised(x: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Compute rows of Gram matrices [sets, rows, all rows], normalised, and their former lengths."""
    gram = x[:, rows] @ x.mT
    length = torch.linalg.vector_norm(gram, dim=2, keepdim=True)
    return gram.div_(length.clamp(min=EPS)), length


class _GramDistance(torch.autograd.Function):
    """The distances with their gradient, in blocks of sets, and of rows where one set exceeds a block."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        count = student.shape[1]
        at_once, step = max(1, BLOCK // count**2), max(1, min(count, BLOCK // count))
        wanted, whole = ctx.needs_input_grad[0], step >= count
        totals, gradients = [], []
        for x, y in zip(student.split(at_once), teacher.split(at_once), strict=True):
            gradient = torch.zeros_like(x) if wanted and not whole else None
            total = x.new_zeros(len(x))
            for start in range(0, count, step):
                rows = slice(start, start + step)
                own, length = _normalised(x, rows)
                difference = own - _normalised(y, rows)[0].to(x.dtype)
                total += difference.square().sum((1, 2))
                if not wanted:
                    continue
                # Differentiate the normalisation. Rows shorter than EPS are divided by EPS.
                along = (difference * own).sum(2, keepdim=True).masked_fill_(length < EPS, 0.0)
                pull = torch.addcmul(difference, along, own, value=-1).mul_(2 / length.clamp_(min=EPS))
                if gradient is None:
                    gradient = torch.bmm(pull + pull.mT, x)
                else:
                    gradient.baddbmm_(pull.mT, x[:, rows])
                    gradient[:, rows].baddbmm_(pull, x)
            totals.append(total)
            gradients.append(gradient)
        made = [one for one in gradients if one is not None]
        ctx.save_for_backward(*([torch.cat(made) if len(made) > 1 else made[0]] if made else []))
        return torch.cat(totals)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][:, None, None] * ctx.saved_tensors[0], None
