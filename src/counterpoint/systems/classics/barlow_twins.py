"""Barlow Twins: the cross-correlation of two views' embeddings is to be the identity matrix.

Zbontar, Jing, Misra, LeCun, Deny: "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021, arXiv
2103.03230.

The loss (Eqs. 1 and 2), standardised over the batch of all processes.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.alignment import off_diagonal_squares
from counterpoint.core.checks import need_alike, need_positive
from counterpoint.core.contrast import wide
from counterpoint.core.distributed import gather_rows


def _standardised(z: Tensor, eps: float) -> Tensor:
    if len(z) == 1:  # batch_norm refuses what is all mean
        return z - z
    return F.batch_norm(z, None, None, training=True, eps=eps)


def barlow(
    z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"], lambda_: float = 0.0051, bn_eps: float = 1e-5
) -> Float[Tensor, ""]:
    r"""sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2 (Eq. 1), C = z1^T z2 / n of embeddings standardised over the batch (Eq. 2).

    Args:
        z1, z2: embeddings of the two views, row by row; standardised here by the biased variance.
        lambda_: weight of redundancy reduction.
        bn_eps: added to the variance inside the root, as batch normalisation does.

    C is made only where dim < 2n; wider embeddings need [n, n] products alone (see `off_diagonal_squares`). A batch of one
    or of equal rows is standardised to zeros: C = 0 and the loss is dim. Raises ValueError for shapes that differ.

    >>> import torch
    >>> barlow(torch.ones(4, 3), torch.ones(4, 3))
    tensor(3.)
    """
    need_alike("n dim", z1=z1, z2=z2)
    need_positive(bn_eps=bn_eps)
    a, b = (_standardised(gather_rows(wide(z)), bn_eps) for z in (z1, z2))
    n = len(a)
    diagonal = (a * b).sum(0) / n
    return (1 - diagonal).square().sum() + lambda_ / n**2 * off_diagonal_squares(a, b)
