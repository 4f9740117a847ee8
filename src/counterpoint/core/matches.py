"""Judge all pairs of two sets one by one by their distance (PCME's soft contrast), in linear memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike
from counterpoint.core.distributed import gather_rows, mean_of_total, place
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, scalar, wide
from counterpoint.core.transforms import once
from counterpoint.core.world import over_group

EPS = 1e-6  # of the squared distance
BLOCK = 2**20  # pairs that are judged at a time: 4 MiB in float32


def distance_cross_entropy(
    x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"], scale: Float[Tensor, ""], shift: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Sum the binary cross-entropies of all pairs, of which pairs of one position match.

    The logit of a pair is shift - scale sqrt(||x_i - y_j||^2 + 1e-6).

    Args:
        x, y: rows of pairs. Across processes, these rows of x meet the rows of y of all processes.
        scale, shift: of the distances.

    The matrix of pairs is not kept. Beyond 2^20 pairs its gradient is computed with it, in blocks of rows, and there is no second
    derivative.

    >>> round(float(distance_cross_entropy(torch.eye(2), torch.eye(2), torch.tensor(30.0), torch.tensor(30.0))), 7)
    8e-06
    """
    here, every = place(len(x), x.device), gather_rows(y)
    at_once = max(1, BLOCK // max(1, len(every)))
    if len(x) <= at_once:
        return _block(x, every, scale, shift, here.offset)
    what = f"a loss over {len(x)} x {len(every)} distances"
    total: Tensor = _Blocks.apply(once(x, what), once(every, what), scale, shift, here.offset, at_once)
    return total


def _block(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, first: int) -> Tensor:
    """Judge the rows of x with positions from `first` on, and all rows of y."""
    one, other = torch.ones_like(x[:, :1]), torch.ones_like(y[:, :1])
    left = torch.cat([x, x.square().sum(1, keepdim=True) + EPS, one], 1)
    right = torch.cat([-2 * y, other, y.square().sum(1, keepdim=True)], 1)
    logits = shift - scale * (left @ right.T).clamp(min=EPS).sqrt()
    if len(x):
        logits = logits.diagonal_scatter(-logits.diagonal(first), first)  # the pairs that match
    return F.softplus(logits).sum()


class _Blocks(torch.autograd.Function):
    """The sum over blocks of rows; the forward pass makes the gradients of a block while its matrix is there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, first: int, at_once: int) -> Tensor:
        inputs = (x, y, scale, shift)
        total, found = x.new_zeros(()), [torch.zeros_like(given) for given in inputs]
        needed = any(ctx.needs_input_grad)
        for start in range(0, len(x), at_once):
            part = slice(start, start + at_once)
            with torch.set_grad_enabled(needed):
                leaves = [given.detach().requires_grad_(needed) for given in (x[part], y, scale, shift)]
                rows, keys, a, b = leaves
                value = _block(rows, keys, a, b, first + start)
            total += value.detach()
            if needed:
                for into, more in zip((found[0][part], *found[1:]), torch.autograd.grad(value, leaves), strict=True):
                    into += more
        ctx.save_for_backward(*found)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return *(gradient * found for found in ctx.saved_tensors), None, None


@over_group
@full_precision
def soft_contrastive(
    image_emb: Float[Tensor, "n dim"],
    text_emb: Float[Tensor, "n dim"],
    negative_scale: float | Float[Tensor, ""] = 15.0,
    shift: float | Float[Tensor, ""] = 15.0,
) -> Float[Tensor, ""]:
    r"""Sum the binary cross-entropies of all n^2 pairs, in both directions (PCME's loss without variances).

    With l_ij = -a sqrt(||v_i - t_j||^2 + 1e-6) + b, a pair matches with probability sigmoid(2 l_ij). Only the pairs i = j match.

    Args:
        image_emb, text_emb: embeddings of n pairs, of any norm; normalised here.
        negative_scale, shift: a and b, learnable scalars or numbers; by default 15.

    The result is a sum, not a mean. Memory is linear in n. Across processes, all pairs of all processes count.

    Raises ValueError for shapes that differ and for an empty batch.

    >>> soft_contrastive(torch.eye(2), torch.eye(2), 15.0, 15.0)
    tensor(1.6045e-05)
    """
    need_alike("n dim", image_emb=image_emb, text_emb=text_emb)
    v, t = unit(wide(image_emb)), unit(wide(text_emb))
    a, b = scalar(negative_scale, v), scalar(shift, v)
    return mean_of_total(2 * distance_cross_entropy(v, t, 2 * a, 2 * b), 1)
