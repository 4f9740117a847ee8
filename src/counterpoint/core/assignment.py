"""Even assignments by Sinkhorn's algorithm: of samples to prototypes, of one modality's rows to another's."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core import kernel
from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.checks import need_positive, need_rows
from counterpoint.core.contrast import pair_logsumexp, pair_logsumexp_towards
from counterpoint.core.operands import scaled, with_bias
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import holds

WHOLE = 1024  # maximum number of rows whose assignments `assigned_cross_entropy` holds as matrices


@full_precision
@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "*crops n prototypes"], epsilon: float = 0.05, iterations: int = 3
) -> Float[Tensor, "*crops n prototypes"]:
    r"""Compute codes: a row of exp(scores / epsilon) for each sample, scaled so that prototypes share the samples evenly.

    Prototypes, then samples, are scaled to equal sums, `iterations` times. So rows sum to 1, and columns nearly to
    n / prototypes. No gradient. Source: SwAV (arXiv 2006.09882, Eq. 5), SwALIP (arXiv 2305.08675).

    Args:
        scores: similarity of each sample with each prototype; each crop is scaled separately.
        epsilon: > 0; a smaller value is closer to a hard assignment.
        iterations: >= 1.

    No scores overflow: where their spread over epsilon exceeds the range of the exponential, logarithms are scaled
    instead. Raises ValueError for empty scores, and for an epsilon or a number of iterations out of range.

    >>> sinkhorn(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    need_positive(epsilon=epsilon, iterations=iterations)
    if scores.ndim < 2 or not scores.numel():
        raise ValueError(f"scores must be [..., n, prototypes] and not empty, got {list(scores.shape)}")
    # The prototypes are scaled first: whatever factor one of them had on all its scores is gone after that.
    logs = wide(scores).contiguous() / epsilon
    logs = logs - logs.amax(-2, keepdim=True)
    if _holds(logs):
        for q in logs.exp_().view(-1, *logs.shape[-2:]):
            per_prototype, per_sample = _scalings(q, iterations)
            q.mul_(per_prototype).mul_(per_sample[:, None])
        return logs
    for _ in range(iterations):
        logs = logs - logs.logsumexp(-2, keepdim=True)
        logs = logs - logs.logsumexp(-1, keepdim=True)
    return logs.exp_()


def _holds(logs: Tensor) -> bool:
    """Return whether exponentials of these logarithms can be scaled without loss; the largest in each column is 0.

    Where vmap or torch.compile hides the values, the result is False, and logarithms are scaled.
    """
    return holds(logs.amin() > 0.7 * math.log(torch.finfo(logs.dtype).tiny))


def _scalings(q: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the columns and of the rows; only these change, so a scaling is a product with a vector."""
    per_sample = q.new_ones(len(q))
    for _ in range(iterations):
        per_prototype = q.T.mv(per_sample).reciprocal_()
        per_sample = q.mv(per_prototype).reciprocal_()
    return per_prototype, per_sample


@full_precision
@torch.no_grad()
def sinkhorn_bias(
    query: Float[Tensor, "rows dim"], key: Float[Tensor, "columns dim"], epsilon: float = 0.05, iterations: int = 3
) -> Float[Tensor, " columns"]:
    r"""Compute the b for which softmax_j(q_i . k_j / epsilon + b_j) is row i of `sinkhorn(query @ key.T)`.

    A matrix larger than the kernel's budget (`core.kernel.KEEP`) is not held in memory. Rows of the codes sum to 1, so the
    softmax does their scaling. With the bias as one more column of the operands (`with_bias`) the codes are the
    teacher of `pair_cross_entropy`. Raises ValueError for an epsilon or iterations out of range.

    >>> sinkhorn_bias(torch.eye(2), torch.eye(2)).softmax(0)
    tensor([0.5000, 0.5000])
    """
    need_positive(epsilon=epsilon, iterations=iterations)
    need_rows(query=query, key=key)
    query, key = scaled(query, epsilon), wide(key)
    if len(query) * len(key) * query.element_size() <= kernel.KEEP:
        logs = query @ key.T
        largest = logs.amax(0)
        logs -= largest
        if _holds(logs):
            return _scalings(logs.exp_(), iterations)[0].log_() - largest
    row = query.new_zeros(len(query))
    for turn in range(iterations):
        column = -pair_logsumexp(*with_bias(key, query, column=row)).rows
        if turn + 1 < iterations:
            row = -pair_logsumexp(*with_bias(query, key, column=column)).rows
    return column


def assigned_cross_entropy(
    query: Float[Tensor, "n dim"],
    key: Float[Tensor, "n dim"],
    teacher_query: Float[Tensor, "n dim"],
    teacher_key: Float[Tensor, "n dim"],
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Float[Tensor, ""]:
    r"""Compute the cross-entropy of paired rows towards the assignments of a teacher, the mean of both directions.

        1/2 [ H(K(T), softmax(S)) + H(K(T^T), softmax(S^T)) ],      S = query key^T,  T = teacher_query teacher_key^T

    K is `sinkhorn` (no gradient). H is the mean cross-entropy of rows.

    Args:
        query, key: rows to learn; scaled already.
        teacher_query, teacher_key: rows to assign to each other; normalised already, without a gradient.
        epsilon, iterations: arguments of `sinkhorn`.

    Up to `WHOLE` rows the assignments are held as matrices. For more rows an assignment is a softmax with a bias for
    each column (`sinkhorn_bias`). The assignment of the transposed matrix has a bias for each row. Neither bias changes the
    other softmax, so one pass gives both directions.
    """
    q, k = teacher_query.detach(), teacher_key.detach()
    if len(q) <= WHOLE:
        scores = q @ k.T
        # Both directions' targets weigh the same similarities.
        codes = sinkhorn(scores, epsilon, iterations) + sinkhorn(scores.T, epsilon, iterations).T
        found = pair_logsumexp_towards(query, key, lambda rows, columns: codes[rows, columns], columns=True)
        assert found.columns is not None
        return (found.rows + found.columns - found.towards).mean() / 2
    biases = {"row": sinkhorn_bias(k, q, epsilon, iterations), "column": sinkhorn_bias(q, k, epsilon, iterations)}
    out = pair_cross_entropy(query, key, *with_bias(q / epsilon, k, **biases), columns=True)
    assert out.columns is not None
    return (out.rows.mean() + out.columns.mean()) / 2
