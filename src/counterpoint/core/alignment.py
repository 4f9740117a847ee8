"""Terms that align two views without negatives, shared by several methods."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike, need_rows, shapes
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import over_group


@over_group
@full_precision
def negative_cosine(prediction: Float[Tensor, "n dim"], target: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Compute D(p, z) = -mean_i p_i . sg(z_i) of normalised rows (SimSiam, arXiv 2011.10566, Eq. 1, stop-gradient of Eq. 3).

    SimSiam's loss is D(p1, z2)/2 + D(p2, z1)/2. BYOL's squared distance of unit vectors (arXiv 2006.07733, Eq. 2) is
    2 + 2 D(p1, z2). BYOL's loss adds the same term with the views exchanged.

    Args:
        prediction: output of the predictor for one view; normalised here.
        target: projection of the other view; normalised here, no gradient.

    A row of zeros has cosine 0. Raises ValueError for shapes that differ and for an empty batch.

    >>> import torch
    >>> negative_cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
    tensor(-1.)
    """
    need_alike("n dim", prediction=prediction, target=target)
    p = unit(prediction)
    z = unit(target.detach())
    return -global_mean((p * z).sum(1))


@full_precision
def swapped_entropy(
    targets: Float[Tensor, "first n outcomes"], *logits: Float[Tensor, "_ n outcomes"]
) -> Float[Tensor, ""]:
    """Compute the mean cross-entropy between target v and softmax(logits w), over views v with a target and views w != v.

    Args:
        targets: distributions of the first views (rows sum to 1), no gradient.
        logits: those of all views, in any number of groups; the first views of the first group are those with a target.

    Each softmax is computed once, not once a pair. Raises ValueError for shapes that do not fit and when there is no pair
    of different views. Source: SwAV (arXiv 2006.09882, Eqs. 1, 2 and 6), DINO (arXiv 2104.14294, Eq. 3).

    >>> import torch
    >>> swapped_entropy(torch.tensor([[[1.0, 0.0]]]), torch.zeros(2, 1, 2))
    tensor(0.6931)
    """
    views = sum(map(len, logits))
    if any(group.ndim != 3 or group.shape[1:] != targets.shape[1:] for group in logits):
        named = {f"logits {number}": group for number, group in enumerate(logits)}
        raise ValueError(
            f"targets and logits must be [views, n, outcomes] alike, got {shapes(targets=targets, **named)}"
        )
    if views < 2 or not 1 <= len(targets) <= len(logits[0]):
        raise ValueError(
            f"{len(targets)} views with a target, {views} in all: there must be another to compare one with"
        )
    need_rows(targets=targets[0])
    logs = [F.log_softmax(wide(group), dim=2) for group in logits]
    everyone = sum((group.sum(0) for group in logs[1:]), logs[0].sum(0))
    own = logs[0][: len(targets)]
    rows = (targets.detach().to(own.dtype) * (own - everyone)).sum((0, 2))
    return global_mean(rows) / (len(targets) * (views - 1))


@full_precision
def off_diagonal_squares(a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Sum (a^T b)_ij^2 over i != j, the energy that redundancy reduction removes from a [dim, dim] matrix of moments.

    |a^T b|^2 = <a a^T, b b^T>, so wide embeddings of a small batch need only products of [n, n]. This way subtracts the
    diagonal's squares from the whole. It is accurate for a low rank (dim >= 2n), where at least half of the energy lies
    off the diagonal. Otherwise the matrix itself is computed.

    >>> import torch
    >>> off_diagonal_squares(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor(52.)
    """
    need_alike("n dim", a=a, b=b)
    n, dim = a.shape
    if dim < 2 * n:
        return (a.T @ b).fill_diagonal_(0).square().sum()
    left = a @ a.T
    right = left if a is b else b @ b.T
    return (left * right).sum() - (a * b).sum(0).square().sum()


@over_group
@full_precision
def barlow_cross(
    z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"], redundancy: float = 5e-3, weight: float = 0.025
) -> Float[Tensor, ""]:
    """Compute weight (sum_i (C_ii - 1)^2 + redundancy sum_{i != j} C_ij^2) of paired projections, C = z1^T z2 / n.

    Args:
        z1, z2: projections, such as of image and text, row by row. They are not normalised here: the projector ends in a
            normalisation over the batch.
        redundancy: weight of the entries off the diagonal.
        weight: factor of the term.

    Across processes C is that of the whole batch. Raises ValueError for shapes that differ. Source: Barlow Twins (arXiv
    2103.03230, Eq. 1), with the weights of BarLIP (arXiv 2305.08675).

    >>> import torch
    >>> round(float(barlow_cross(torch.eye(2) * 2**0.5, torch.eye(2) * 2**0.5)), 9)
    0.0
    """
    need_alike("n dim", z1=z1, z2=z2)
    a, b = gather_rows(wide(z1)), gather_rows(wide(z2))
    n = len(a)
    on = ((a * b).sum(0) / n - 1).square().sum()
    return weight * (on + redundancy / n**2 * off_diagonal_squares(a, b))


@over_group
@full_precision
def byol_cross(prediction: Float[Tensor, "n dim"], target: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Compute 2 - 2 mean_i cos(p_i, v_i), with one modality's prediction p of the other's projection v.

    Both are normalised here; v gets no gradient. Raises ValueError for shapes that differ. Source: BYOL (arXiv 2006.07733,
    Eq. 2), between modalities as in SiamLIP and BYOLIP (arXiv 2305.08675).

    >>> import torch
    >>> byol_cross(torch.eye(2), torch.eye(2))
    tensor(0.)
    """
    need_alike("n dim", prediction=prediction, target=target)
    return 2 + 2 * negative_cosine(prediction, target)
