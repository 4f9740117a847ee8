r"""Gaussian kernels between the rows of one batch, summed in tiles: spread of a batch, and entropy by kernel density.

    K_ij = exp(-|x_i - x_j|^2 / (2 b)),    |x_i - x_j|^2 = |x_i|^2 + |x_j|^2 - 2 x_i . x_j

b is the bandwidth, a variance. No distance is taken, whose gradient at zero is NaN, and no matrix of pairs is stored. The
product of the kernels of two spaces is the kernel of their concatenated rows. The last functions are the terms of SepCLR
(Louiset et al., arXiv 2402.11928).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, shapes
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_logsumexp, global_mean, place
from counterpoint.core.operands import scaled, with_bias
from counterpoint.core.precision import full_precision, products
from counterpoint.core.rules import Diagonal
from counterpoint.core.transforms import once, traced
from counterpoint.core.world import over_group, world

DISCRETE = 5e-6  # 2 b = 1e-5: the kernel tells whether two attributes are equal
PLAIN = 256  # rows up to which the matrix of pairs is held
CHUNK = 1 << 20  # pairs at once in `weighted_spread`


def _log_others(x: Tensor, bandwidth: float) -> Tensor:
    """Compute log sum_{j != i} K_ij of each row i, over the batch of all processes."""
    need_positive(bandwidth=bandwidth)
    own = -x.square().sum(1) / (2 * bandwidth)
    if len(x) <= PLAIN and world()[1] == 1:  # the matrix is small, and fewer operations are faster
        logs = torch.addmm(own[:, None] + own, x / bandwidth, x.T)
        return logs.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), -math.inf).logsumexp(1)
    query, key = with_bias(scaled(x, bandwidth), x, row=own, column=own)
    # Halves of the products would cancel: their rounding, times |x|^2 / b, is in the exponent.
    with products("exact"):
        return batch_logsumexp(query, key, exclude=Diagonal()).rows


@full_precision
def log_mean_kernel(x: Float[Tensor, "n dim"], bandwidth: float = 0.5) -> Float[Tensor, ""]:
    """Compute log mean_{i != j} K_ij, the uniformity of rows that need not be unit rows; 0 of one row.

    Args:
        x: rows, used as given.
        bandwidth: b, > 0, by default 0.5.

    At most 0, and 0 where all rows are equal. It is computed from logarithms, so far rows do not underflow. In float32 the
    error of a pair's exponent is about 1e-7 times |x|^2 / b. Raises ValueError for another shape and an empty batch.

    >>> log_mean_kernel(torch.eye(2))
    tensor(-2.)
    """
    need_alike("n dim", x=x)
    total = place(len(x), x.device).total
    if total < 2:
        return x.sum() * 0
    rows = _log_others(x, bandwidth)
    own = rows.logsumexp(0) if len(rows) else rows.sum() - math.inf
    return global_logsumexp(own) - math.log(total * (total - 1))


@full_precision
def mean_log_density(x: Float[Tensor, "n dim"], bandwidth: float = 0.5) -> Float[Tensor, ""]:
    """Compute mean_i log mean_j K_ij, j = i included: minus the entropy of x by kernel density, up to a constant.

    Args:
        x: rows, used as given.
        bandwidth: b, > 0, by default 0.5.

    It lies between -log n (far rows) and 0 (equal rows, or one row). Raises ValueError as `log_mean_kernel`.

    >>> mean_log_density(torch.tensor([[0.0], [100.0]]))
    tensor(-0.6931)
    """
    need_alike("n dim", x=x)
    total = place(len(x), x.device).total
    if total < 2:
        return x.sum() * 0
    # A row's kernel with itself is 1, without the rounding of |x|^2 + |x|^2 - 2 x.x.
    rows = _log_others(x, bandwidth)
    return global_mean(torch.logaddexp(rows, torch.zeros_like(rows))) - math.log(total)


@over_group
@full_precision
def weighted_spread(
    latent: Float[Tensor, " n"], attribute: Float[Tensor, " n"], bandwidth: float = 0.025
) -> Float[Tensor, ""]:
    """Compute mean_{i < j} exp(-(y_i - y_j)^2 / (2 b)) (z_i - z_j)^2: rows alike in the attribute shall be alike in the latent.

    Args:
        latent: z, one number for each row.
        attribute: y, the known attribute, no gradient.
        bandwidth: b, > 0, by default 0.025.

    0 of one row. The pairs are computed in chunks, forward and backward; there is no second derivative. Raises ValueError for
    shapes that differ and an empty batch.

    >>> weighted_spread(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(9.)
    """
    need_alike("n", latent=latent, attribute=attribute)
    need_positive(bandwidth=bandwidth)
    z, y = gather_rows(latent), gather_rows(attribute.detach())
    n = len(z)
    if n < 2:
        return z.sum() * 0

    def pulls(rows: slice) -> Tensor:
        """Return sum_j w_ij (z_i - z_j) of some rows i."""
        weight = (-(y[rows, None] - y).square() / (2 * bandwidth)).exp()
        return (weight * (z[rows, None] - z)).sum(1)

    if traced():
        return (z * pulls(slice(None))).sum() * 2 / (n * (n - 1))
    # The sum is z^T L z with a symmetric L that does not depend on z: its gradient is 2 L z.
    z = once(z, "weighted_spread")
    step = max(1, CHUNK // n)
    with torch.no_grad():
        pull = torch.cat([pulls(slice(start, start + step)) for start in range(0, n, step)])
        value = (z * pull).sum()
    return ((z * pull).sum() * 2 - value) * 2 / (n * (n - 1))


@over_group
@full_precision
def align(x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"], bandwidth: float = 0.5) -> Float[Tensor, ""]:
    """Compute mean_i |x_i - y_i|^2 / (2 b), of rows as given.

    Args:
        x, y: the two views of n pictures, row by row.
        bandwidth: b, > 0, by default 0.5.

    Raises ValueError for shapes that differ and an empty batch.

    >>> align(torch.eye(2), torch.zeros(2, 2))
    tensor(1.)
    """
    need_alike("n dim", x=x, y=y)
    need_positive(bandwidth=bandwidth)
    return global_mean((x - y).square().sum(1)) / (2 * bandwidth)


@over_group
@full_precision
def uniform(x: Float[Tensor, "n dim"], bandwidth: float = 0.5) -> Float[Tensor, ""]:
    """Compute log mean_{i<j} exp(-|x_i - x_j|^2 / (2 b)), of rows as given; 0 of one row.

    Args:
        x: rows, of any length.
        bandwidth: b, > 0, by default 0.5.

    Raises ValueError for another shape and an empty batch.

    >>> uniform(torch.eye(2))
    tensor(-2.)
    """
    return log_mean_kernel(x, bandwidth)


@over_group
@full_precision
def joint_entropy(
    common: Float[Tensor, "n dim"], salient: Float[Tensor, "n width"], bandwidth: float = 0.5
) -> Float[Tensor, ""]:
    """Compute mean_i log mean_j of the product of both spaces' kernels, minus the joint entropy up to a constant.

    Args:
        common, salient: rows of both spaces, as given.
        bandwidth: b of both, > 0, by default 0.5.

    It lies between -log n and 0. Raises ValueError for another number of rows and an empty batch.

    >>> joint_entropy(torch.zeros(2, 1), torch.tensor([[0.0], [100.0]]))
    tensor(-0.6931)
    """
    if common.ndim != 2 or salient.ndim != 2 or len(common) != len(salient):
        raise ValueError(
            f"common and salient must be [n, dim] and [n, width], got {shapes(common=common, salient=salient)}"
        )
    return mean_log_density(torch.cat([common, salient], 1), bandwidth)


@over_group
@full_precision
def sup_align(
    latent: Float[Tensor, " n"], attribute: Float[Tensor, " n"], bandwidth: float = 0.025
) -> Float[Tensor, ""]:
    """Compute mean_{i<j} exp(-(y_i - y_j)^2 / (2 h)) (z_i - z_j)^2, which ties a salient dimension to a known attribute.

    Args:
        latent: z, one dimension of the salient heads.
        attribute: y, a continuous attribute, scaled to about 0..1; no gradient.
        bandwidth: h, > 0, by default 0.025.

    Raises ValueError for shapes that differ and an empty batch.

    >>> sup_align(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 0.5]))
    tensor(4.)
    """
    return weighted_spread(latent, attribute, bandwidth)


@over_group
@full_precision
def discrete_sup_align(latent: Float[Tensor, " n"], attribute: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Compute `sup_align` of an attribute of separate values: only pairs of one value count.

    Args:
        latent: z, one dimension of the salient heads.
        attribute: y, values at least 0.01 apart; no gradient.

    Raises ValueError as `sup_align`.

    >>> discrete_sup_align(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0]))
    tensor(0.)
    """
    return weighted_spread(latent, attribute, DISCRETE)
