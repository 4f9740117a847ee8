"""Compare sets of vectors by their Gram matrices, whose rows are normalised: which vectors are similar to which."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.operands import EPS
from counterpoint.core.transforms import once, traced

BLOCK = 2**20  # maximum number of entries of the blocks of a Gram matrix


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


def _normalised(x: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Compute rows of Gram matrices [sets, rows, all rows], normalised, and their former lengths."""
    gram = x[:, rows] @ x.mT
    length = torch.linalg.vector_norm(gram, dim=2, keepdim=True)
    return gram.div_(length.clamp(min=EPS)), length


class _GramDistance(torch.autograd.Function):
    """The distances with their gradient, in blocks of sets, and of rows where one set exceeds a block."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        sets, count, _ = student.shape
        at_once, step = max(1, BLOCK // count**2), max(1, min(count, BLOCK // count))
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student) if wanted else None
        total = student.new_zeros(sets)
        for first in range(0, sets, at_once):
            these = slice(first, first + at_once)
            x, y = student[these], teacher[these]
            for start in range(0, count, step):
                rows = slice(start, start + step)
                own, length = _normalised(x, rows)
                difference = own - _normalised(y, rows)[0].to(x.dtype)
                total[these] += difference.square().sum((1, 2))
                if gradient is None:
                    continue
                # Differentiate the normalisation, of which rows shorter than EPS have none.
                along = (difference * own).sum(2, keepdim=True).masked_fill(length < EPS, 0.0)
                pull = (difference - along * own).mul_(2 / length.clamp(min=EPS))
                if step >= count:
                    gradient[these] = (pull + pull.mT) @ x
                else:
                    gradient[these] += pull.mT @ x[:, rows]
                    gradient[these, rows] += pull @ x
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][:, None, None] * ctx.saved_tensors[0], None
