r"""Expected squared distance of rows to keys under a softmax of the distances themselves, block by block.

    sum_i w_i sum_s sum_{j != own_i} p_isj d2(q_i, k_sj),      p_is = softmax_{j != own_i}( -sharpness d2(q_i, k_sj) )

Legend.

    q          rows [N, D]
    k          sets of keys [S, n, D], each set with a softmax of its own
    d2         squared Euclidean distance
    sharpness  factor of the distances, 0 to 1e30; 0 weighs all keys alike
    own_i      the key of each set that row i does not see
    w_i        weight of a row
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_within
from counterpoint.core.precision import exact, full_precision, wide
from counterpoint.core.rules import Diagonal
from counterpoint.core.transforms import holds, once, traced

# Distances that are held at a time: in float32 a block and what is made of it stay in the cache.
BLOCK = 2**19
# Factors beyond these overflow in float32, or weigh all alike to the last digit.
SMALLEST, LARGEST = 1e-20, 1e30


class _Expected(torch.autograd.Function):
    """sum_i w_i sum_y E_iy[d2] for sharpness > 0.

    The result is one number, so its gradients are known up to a factor while a block's distances are there: they are made in
    the forward pass, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        sharpness: float,
        own: Tensor,
        weight: Tensor | None,
        through: bool,
        wanted: bool,
    ) -> Tensor:
        sets, n, dim = key.shape
        keys = key.reshape(sets * n, dim)
        bias = keys.square().sum(1).mul_(-sharpness)
        to_query = torch.empty_like(query) if wanted and ctx.needs_input_grad[0] else None
        to_key = torch.zeros_like(keys) if wanted and ctx.needs_input_grad[1] else None
        pulls = keys.new_zeros(sets * n)  # of each key, summed over the queries
        total = query.new_zeros(())
        step = max(1, BLOCK // (sets * n))
        with exact(query.device.type):
            for start in range(0, len(query), step):
                rows = query[start : start + step]
                # -sharpness d2, but for what is one and the same in a row
                logits = torch.addmm(bias, rows, keys.T, alpha=2 * sharpness).view(len(rows), sets, n)
                unseen = own[start : start + step, None, None].expand(-1, sets, 1)
                p = logits.scatter_(2, unseen, -math.inf).softmax(2)
                logits.scatter_(2, unseen, 0.0)  # 0 times -inf is not 0
                expected = logits.mul_(p).sum(2, keepdim=True)
                w = None if weight is None else weight[start : start + step]
                costs = rows.square().sum(1).mul_(sets).sub_(expected.sum((1, 2)), alpha=1 / sharpness)
                total += costs.sum() if w is None else w @ costs
                if to_query is None and to_key is None:
                    continue
                # An expectation under p moves with a logit by p (1 + logit - expectation), or by p if p stands still.
                g = logits.addcmul_(p, expected.sub_(1), value=-1) if through else p
                g = g.view(len(rows), sets * n)
                if to_query is not None:
                    # Rows of g sum to 1 in each set. Both gradients lack a factor of 2, which comes with the one from above.
                    part = torch.addmm(rows, g, keys, beta=sets, alpha=-1, out=to_query[start : start + step])
                    if w is not None:
                        part.mul_(w[:, None])
                if to_key is not None:
                    to_key.addmm_(g.T, rows if w is None else rows * w[:, None])
                    pulls += g.sum(0) if w is None else w @ g
        if to_key is not None:
            to_key = torch.addcmul(to_key.neg_(), pulls[:, None], keys, out=to_key).view_as(key)
        ctx.save_for_backward(to_query, to_key)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if g is None else (2 * gradients[0]) * g for g in ctx.saved_tensors]
        return *found, None, None, None, None, None


def expected_costs(
    query: Tensor, key: Tensor, sharpness: float, own: Tensor, weight: Tensor | None, through: bool
) -> Float[Tensor, ""]:
    """Return the sum above, a number, of arguments that fit; `through`: whether the gradient flows through p.

    The gradients are made in the forward pass, so memory grows with rows and keys, not with their product.
    """
    if sharpness < SMALLEST:
        # The plain mean, without a matrix at all; the weights do not move.
        n = key.shape[1]
        sums = n * query.square().sum(1) + key.square().sum((1, 2))[:, None] - 2 * (key.sum(1) @ query.T)
        rows = ((sums - (query - key[:, own]).square().sum(2)) / (n - 1)).sum(0)
        return (rows if weight is None else rows * weight).sum()
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if traced() and through:
        return _composed(query, key, sharpness, own, weight, through)
    what = "the expected distance"
    query, key = once(query, what), once(key, what)
    if traced():
        return _composed(query, key, sharpness, own, weight, through)
    return _Expected.apply(query, key, sharpness, own, weight, through, wanted)


@full_precision
def expected_distance(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "sets n dim"],
    sharpness: float,
    *,
    own: Int[Tensor, " rows"] | None = None,
    weight: Float[Tensor, " rows"] | None = None,
    through: bool = True,
) -> Float[Tensor, ""]:
    r"""Compute the expected squared distance of rows to keys, weighted towards the closest, which repulsion maximises.

        sum_i w_i sum_s sum_{j != own_i} p_isj d2(q_i, k_sj),      p_is = softmax_{j != own_i}( -sharpness d2(q_i, k_sj) )

    Args:
        query: any rows, which this function does not normalise.
        key: sets of keys, each with a separate softmax.
        sharpness: in 0..1e30; 0 gives all keys equal weights.
        own: number of the key in each set that a row excludes; None: i for row i.
        weight: w_i, without gradient; None: 1.
        through: let the gradient flow through the weights p (default).

    Returns the sum, 0 for no rows. The forward pass computes the gradients, so memory grows with rows and keys, not with
    their product. There is no second derivative.

    Raises ValueError for shapes that do not fit, for rows without keys, or a sharpness out of its range.

    Source: arXiv 2105.03746, the cost of the negatives under their conditional distribution.

    >>> x = torch.eye(3)
    >>> expected_distance(x, x[None], sharpness=1.0)
    tensor(6.)
    """
    if query.ndim != 2 or key.ndim != 3 or query.shape[1] != key.shape[2]:
        raise ValueError(
            f"query and key must be [rows, dim] and [sets, n, dim], got {list(query.shape)} and {list(key.shape)}"
        )
    if not len(key) or key.shape[1] < 2:
        raise ValueError(f"key must hold a set of at least 2, because each row excludes one; got {list(key.shape)}")
    own = torch.arange(len(query), device=query.device) if own is None else own
    if own.shape != query.shape[:1] or holds(((own < 0) | (own >= key.shape[1])).any()):
        raise ValueError(f"own must hold, for each of {len(query)} rows, one of the {key.shape[1]} keys")
    need_within(0, LARGEST, sharpness=sharpness)
    weight = None if weight is None else weight.detach()
    return expected_costs(wide(query), wide(key), sharpness, own, weight, through)


def _composed(
    query: Tensor, key: Tensor, sharpness: float, own: Tensor, weight: Tensor | None, through: bool
) -> Float[Tensor, ""]:
    """Return the same by PyTorch's own operations, in memory rows x keys."""
    distance = query.square().sum(1)[:, None, None] + key.square().sum(2) - 2 * torch.einsum("rd,snd->rsn", query, key)
    apart = torch.arange(key.shape[1], device=own.device) == own[:, None]
    p = (-sharpness * distance).masked_fill(apart[:, None], -math.inf).softmax(2)
    rows = ((p if through else p.detach()) * distance).sum((1, 2))
    return (rows if weight is None else rows * weight).sum()


def mean_key(
    queries: Float[Tensor, "views n dim"], keys: Float[Tensor, "all dim"], temperature: float, offset: int
) -> Float[Tensor, "views n dim"]:
    """Return the mean key of each row, weighed by a softmax of its similarities; no gradient.

        sum_{j != i} w_vij k_j,      w_vi = softmax_{j != i}( q_vi . k_j / temperature )

    Args:
        queries: sets of rows. Row i of each set does not see key offset + i.
        keys: rows to average.
        temperature: > 0.
        offset: the key that the first row of each set does not see.
    """
    out = torch.empty_like(queries)
    step = max(1, BLOCK // len(keys))
    apart = Diagonal((offset,))
    with torch.no_grad(), exact(queries.device.type):
        for view, into in zip(queries, out, strict=True):
            for start in range(0, len(view), step):
                part = slice(start, min(start + step, len(view)))
                s = torch.mm(view[part] / temperature, keys.T)
                apart.exclude(s, part, slice(0, len(keys)))
                torch.mm(s.softmax(1), keys, out=into[part])
    return out
