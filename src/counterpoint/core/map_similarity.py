"""Compare feature maps place by place: the cosine over channels, averaged over a picture, and its contrast (PCL-SR)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.operands import EPS, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group

Maps = Float[Tensor, "b channels height width"]


def need_maps(anchor: Tensor, **others: Sequence[Tensor] | Tensor) -> None:
    """Raise ValueError unless the anchor is a batch of maps and all other maps have its shape."""
    if anchor.ndim != 4:
        raise ValueError(f"anchor must be [b, channels, height, width], got {shapes(anchor=anchor)}")
    need_rows(anchor=anchor)
    for name, maps in others.items():
        for one in maps:
            if one.shape != anchor.shape:
                raise ValueError(f"{name} must each be like anchor {list(anchor.shape)}, got {list(one.shape)}")


def unit_maps(anchor: Maps) -> Float[Tensor, "b height width channels"]:
    """Normalise over channels at each place. A place of zeros stays zero and gets no gradient."""
    zero = (anchor.detach() == 0).all(1, keepdim=True)
    return unit(anchor.masked_fill(zero, 0.0).movedim(1, 3))


def map_similarity(unit_anchor: Tensor, other: Maps) -> Float[Tensor, " b"]:
    """Compute the mean cosine of each row of maps. The other maps get no gradient, and no normalised copy is made."""
    rows = other.detach().movedim(1, 3)
    length = torch.linalg.vector_norm(rows, dim=-1).clamp(min=EPS)
    return (torch.linalg.vecdot(unit_anchor, rows) / length).mean((1, 2))


@over_group
@full_precision
def patch_nce(
    anchor: Maps,
    positives: Float[Tensor, "positives b channels height width"] | Sequence[Maps],
    negatives: Float[Tensor, "negatives b channels height width"] | Sequence[Maps],
    include_positive_in_denominator: bool = True,
) -> Float[Tensor, ""]:
    r"""Compute mean_k l_k: each positive is contrasted with all negatives of its scene, at temperature 1.

    This function normalises over channels at each place. A place of zeros has similarity 0.

    Args:
        anchor: feature maps of the outputs.
        positives: one or more maps like the anchor, a tensor or a list; no gradient.
        negatives: any number of maps likewise; without any, the loss is 0.
        include_positive_in_denominator: False: "LMCL", the positive is left out of the denominator, and the loss can be
            negative. Default: True.

    Returns:
        The loss, a scalar. Similarities lie in -1..1, so it is at least log(1 + N e^-2), and log(1 + N) where all are equal.

    Raises:
        ValueError: shapes that do not fit, an empty batch, no positive, or no negative with LMCL.

    Source: the authors' code, loss/cl.py.

    >>> a = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    >>> patch_nce(a, [a], [-a])  # log(1 + e^-2)
    tensor(0.1269)
    """
    need_maps(anchor, positives=positives, negatives=negatives)
    if not len(positives):
        raise ValueError("positives must hold at least one map")
    if not len(negatives) and not include_positive_in_denominator:
        raise ValueError("negatives must hold at least one map where the denominator has no positive (LMCL)")
    a = unit_maps(anchor)
    positive = torch.stack([map_similarity(a, one) for one in positives])
    if not len(negatives):
        return global_mean(0 * positive.mean(0))
    log_z = torch.stack([map_similarity(a, one) for one in negatives]).logsumexp(0)
    losses = F.softplus(log_z - positive) if include_positive_in_denominator else log_z - positive
    return global_mean(losses.mean(0))
