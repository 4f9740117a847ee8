"""Judge all pairs of two sets one by one by their distance, in memory linear in the number of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from counterpoint.core.distributed import gather_rows, place

BLOCK = 2**20  # pairs that are judged at a time: 4 MiB in float32


def distance_cross_entropy(
    x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"], scale: Float[Tensor, ""], shift: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Sum the binary cross-entropies of all pairs, of which pairs of one position match.

    The logit of a pair is shift - scale sqrt(||x_i - y_j||^2 + 1e-6).

    Args:
        x, y: rows of pairs. Across processes, these rows of x meet the rows of y of all processes.
        scale, shift: of the distances.

    The matrix of pairs is not kept: beyond 2^20 pairs the backward pass computes it again, in blocks of rows.

    >>> distance_cross_entropy(torch.eye(2), torch.eye(2), torch.tensor(30.0), torch.tensor(30.0))
    tensor(8.0225e-06)
    """
    here, every = place(len(x), x.device), gather_rows(y)
    at_once = max(1, BLOCK // max(1, len(every)))
    total = x.sum() * 0 + every.sum() * 0  # of a process without rows, whom others wait for
    for start in range(0, len(x), at_once):
        given = (x[start : start + at_once], every, scale, shift, here.offset + start)
        total = total + (
            _block(*given)
            if len(x) <= at_once
            else checkpoint(_block, *given, use_reentrant=False, preserve_rng_state=False)
        )
    return total


def _block(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, first: int) -> Tensor:
    """Judge the rows of x with positions from `first` on, and all rows of y."""
    square = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.T)).clamp(min=0)
    logits = shift - scale * (square + 1e-6).sqrt()
    own = torch.arange(len(x), device=x.device)[:, None] + first == torch.arange(len(y), device=x.device)
    return F.softplus(torch.where(own, -logits, logits)).sum()
