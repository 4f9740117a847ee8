"""A weighted sum of log Z over all rows, whose gradient is made in the forward pass: three products at any size.

`core.kernel` returns log Z of every row. Their gradients a_i arrive in the backward pass, so the matrix of similarities is then
kept or computed again. A loss of whole rows usually needs one number only,

    total = sum_i a_i log Z_i        with a_i known beforehand, say 1 / rows.

Let p_i be the softmax of row i. The gradients are dq_i = a_i sum_j p_ij k_j and dk_j = sum_i a_i p_ij q_i. One number arrives
for the total, and multiplies them. No part of the matrix is kept.

The cross-entropy of each row with one column t_i subtracts s_i,t_i from log Z_i. Its gradient subtracts 1 from p_i,t_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core import chunks, kernel
from counterpoint.core.distributed import mean_of_total, place
from counterpoint.core.exponentials import exp_
from counterpoint.core.kernel import Operands, Tile, add_product, finite, put_product, refused
from counterpoint.core.precision import Products, exact, full_precision, products, wide
from counterpoint.core.rules import Block, Rule
from counterpoint.core.transforms import holds, traced

# Similarities of a stripe of whole rows, 32 MiB in float32: with fewer rows, products of 16,384 keys are a fifth slower.
STRIPE = 2**23

# Up to this many similarities, PyTorch's own cross-entropy of the whole matrix is as fast.
SMALL = 2**18


class _Total(torch.autograd.Function):
    """The total, with the gradients of query, key and share."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        share: Tensor,
        target: Tensor | None,
        rules: Sequence[Rule],
        weight: Block | None,
        origin: tuple[int, int],
    ) -> Tensor:
        work = Operands(query, key, rules, weight, origin)
        wanted = ctx.needs_input_grad[:2]
        with exact(query.device.type):
            if chunks.usable(query):
                found = _chunks(work, share, target, wanted[1])
            else:
                found = _stripes(work, share, target, wanted)
        ctx.save_for_backward(query, key, share, *found)
        # A row without entries counts only where its share is not 0.
        return found[0].mul(share).masked_fill_(share == 0, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, share, rows, to_query, to_key = ctx.saved_tensors
        one = not gradients[0].is_cuda and gradients[0].item() == 1
        found = [
            None if x is None or not needed else x if one else gradients[0] * x
            for x, needed in zip((to_query, to_key, rows), ctx.needs_input_grad, strict=False)
        ]
        if torch.is_grad_enabled():
            leaves = (query, key, share)
            there = [(x, leaf) for x, leaf in zip(found, leaves, strict=True) if x is not None]
            again = iter(refused([x for x, _ in there], [leaf for _, leaf in there]))
            found = [None if x is None else next(again) for x in found]
        return *found, *[None] * 4


Gradients = tuple[Tensor, Tensor | None, Tensor | None]


def _chunks(work: Operands, share: Tensor, target: Tensor | None, to_key: bool) -> Gradients:
    """Return what `_stripes` returns, by the GPU's kernels."""
    rows, pull, push = chunks.known(work.matrix(), share, to_key=to_key)
    if target is not None:
        own = work.key[target]
        rows = rows - torch.linalg.vecdot(work.query, own)
        pull.addcmul_(own, share[:, None], value=-1)
        if push is not None:  # adds in a fixed order, which index_add does not
            push.index_put_((target,), work.query * -share[:, None], accumulate=True)
    return rows, pull, push


def _stripes(work: Operands, share: Tensor, target: Tensor | None, wanted: Sequence[bool]) -> Gradients:
    """Return log Z_i [N] (less s_i,t_i with targets), and dq [N, D] and dk [M, D] for its gradient `share`.

    A gradient that is not wanted is None.
    """
    query, key = work.query, work.key
    rows = query.new_empty(len(query))
    to_query = torch.empty_like(query) if wanted[0] else None
    to_key = torch.empty_like(key) if wanted[1] else None
    few = len(key) < 2 * key.shape[1]
    stripes = min(len(query), -(-len(query) * len(key) // STRIPE))
    for number in range(stripes):  # of equal size
        part = slice(len(query) * number // stripes, len(query) * (number + 1) // stripes)
        stripe = Tile(part, slice(0, len(key)), False)
        s = work.similarities(stripe)
        if target is not None:
            at = target[part, None]
            own = torch.linalg.vecdot(query[part], key[target[part]]) if work.rules else s.gather(1, at)[:, 0]
        top = finite(s.amax(1))
        e = work.weighted(exp_(s.sub_(top[:, None])), stripe)
        z = e.sum(1)
        torch.add(z.log(), top, out=rows[part])
        z.masked_fill_(z == 0, 1.0)
        if target is not None:
            rows[part] -= own
            e.scatter_add_(1, at, -z[:, None])
        # The factors go to the narrower side: to e, or to both matrices that it is multiplied with.
        factor = (share[part] / z)[:, None]
        e = work.rounded(e.mul_(factor) if few else e)
        if to_query is not None:
            put_product(to_query[part], e, work.factor("key"))
            if not few:
                to_query[part].mul_(factor)
        if to_key is not None:
            left = (query[part] if few else query[part] * factor).to(e.dtype)
            (add_product if number else put_product)(to_key, e.T, left)
    return rows, to_query, to_key


@full_precision
def pair_logsumexp_total(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    share: Float[Tensor, " rows"] | None = None,
    *,
    target: Int[Tensor, " rows"] | None = None,
    exclude: Rule | Sequence[Rule] = (),
    weight: Block | None = None,
    origin: tuple[int, int] = (0, 0),
    precision: Products | Literal["auto"] = "auto",
) -> Float[Tensor, ""]:
    r"""Compute sum_i share_i log Z_i with its gradient in the forward pass: three products at any size.

        Z_i = sum_j d_ij exp(q_i . k_j);      with targets  sum_i share_i (log Z_i - q_i . k_t_i),  a cross-entropy

    `core.contrast.pair_logsumexp` returns the rows, and needs four products where its matrix is not kept. Where the keys
    have no gradient, this takes two.

    Args:
        query: one row per anchor; float64, float32, or a half precision (then computed and returned in float32).
        key: the rows that they are compared with.
        share: factor of each row in the sum; default 1 / rows, the mean. It may need a gradient.
        target: t, the number of each row's own key; default none. Rules and weights do not change q_i . k_t_i.
        exclude, weight, origin, precision: as in `core.contrast.pair_logsumexp`.

    Returns:
        The sum, a scalar. A row with nothing in its denominator makes it -inf, unless its share is 0.

    Raises:
        ValueError: shapes or types that do not fit, or on a CPU a target that is no number of a key.
        RuntimeError: the gradient is differentiated again, except for the smallest matrices.

    >>> x = torch.eye(3)
    >>> pair_logsumexp_total(x, x) - x.diagonal().mean()
    tensor(0.5514)
    >>> pair_logsumexp_total(x, x, target=torch.arange(3))
    tensor(0.5514)
    """
    rules = tuple(exclude) if isinstance(exclude, Sequence) else (exclude,)
    if query.ndim != 2 or key.ndim != 2 or query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query and key must be [rows, dim] and [columns, dim], got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if share is not None and share.shape != query.shape[:1]:
        raise ValueError(f"share must be [rows] = [{len(query)}], got {tuple(share.shape)}")
    if target is not None:
        _need_numbers(target, len(query), len(key))
    query, key = wide(query), wide(key)
    entries = len(query) * len(key)
    bare = target is not None and not rules and weight is None
    small = traced() or entries <= (chunks.SMALL if chunks.usable(query) else SMALL if bare else kernel.SMALL)
    if small and target is not None and bare and entries:
        if share is None:
            return F.cross_entropy(query @ key.T, target)
        return (share.to(query.dtype) * F.cross_entropy(query @ key.T, target, reduction="none")).sum()
    share = query.new_full((len(query),), 1 / max(1, len(query))) if share is None else share.to(query.dtype)
    if small:
        rows, _, _ = kernel.plain(query, key, rules, weight, False, origin, None)
        if target is not None:
            rows = rows - torch.linalg.vecdot(query, key[target])
        return (share * rows.masked_fill(share == 0, 0.0)).sum()
    with products(precision):
        return _Total.apply(query, key, share, target, rules, weight, origin)


@full_precision
def mean_cross_entropy(
    query: Float[Tensor, "rows dim"], key: Float[Tensor, "columns dim"], target: Int[Tensor, " rows"]
) -> Float[Tensor, ""]:
    """Compute the mean over the rows of all processes of log sum_j exp(q_i . k_j) - q_i . k_t_i.

    Args:
        query: rows of this process.
        key: the same in all processes: parameters, or gathered rows.
        target: t, the number of each row's own key.

    Errors are those of `pair_logsumexp_total`.

    >>> mean_cross_entropy(torch.eye(3), torch.eye(3), torch.arange(3))
    tensor(0.5514)
    """
    total = pair_logsumexp_total(query, key, query.new_ones(len(query)), target=target)
    return mean_of_total(total, max(1, place(len(query), query.device).total))


def _need_numbers(target: Tensor, rows: int, columns: int) -> None:
    """Refuse targets that do not name one key for each row. Their values are read on a CPU alone (`holds`)."""
    if target.shape != (rows,) or target.is_floating_point():
        raise ValueError(f"target must be [{rows}] whole numbers, got {list(target.shape)} of {target.dtype}")
    if rows and holds(((target < 0) | (target >= columns)).any()):
        low, high = (int(x) for x in target.aminmax())
        raise ValueError(f"target must have numbers from 0 to {columns - 1}, got {low}..{high}")
