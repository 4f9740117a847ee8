"""Contrast of pairs with label smoothing, without a matrix of similarities."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean
from counterpoint.core.operands import positive_similarity, unit
from counterpoint.core.world import world


def smoothed_cross_entropies(
    a: Float[Tensor, "n dim"],
    b: Float[Tensor, "n dim"],
    scale: float | Float[Tensor, ""],
    smoothing: float = 0.0,
    *,
    local_gradients: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute the mean cross-entropies of rows and columns of scale * norm(a) norm(b)^T, with a smoothed diagonal as targets.

    The smoothing's term is the mean of a row's similarities. It equals the similarity with the mean key and needs no matrix.

    Args:
        a, b: paired rows; normalised here. Across processes each row meets the rows of all.
        scale: 1 / temperature, > 0.
        smoothing: e, 0..1: targets are 1 - e on the diagonal plus e / n everywhere. Default: none.
        local_gradients: across processes, only a process's own rows carry gradient. Default: all rows do.
    """
    x, y = (unit(v) for v in (a, b))
    if local_gradients and world()[1] > 1:
        return _one_way(x * scale, y.detach(), smoothing), _one_way(y * scale, x.detach(), smoothing)
    x = x * scale
    out = batch_logsumexp(x, y, columns=True)
    assert out.columns is not None
    positive = (1 - smoothing) * positive_similarity(x, y)
    mean_x, mean_y = (gather_rows(v).mean(0) if smoothing else v.new_zeros(v.shape[1]) for v in (x, y))
    return (
        global_mean(out.rows - positive - smoothing * (x @ mean_y)),
        global_mean(out.columns - positive - smoothing * (y @ mean_x)),
    )


def _one_way(query: Tensor, key: Tensor, smoothing: float) -> Tensor:
    """Compute the cross-entropy of the rows alone."""
    rows = batch_logsumexp(query, key).rows
    everybody = gather_rows(key).mean(0)
    return global_mean(rows - (1 - smoothing) * positive_similarity(query, key) - smoothing * (query @ everybody))
