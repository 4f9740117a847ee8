"""Measures of the gap between two modalities in a shared space, and of each one's uniformity; two are also losses.

Two are the terms of Wang and Isola (arXiv 2005.10242), within and across modalities. The others are the measures of the
paper on the contrastive gap (Fahim et al., arXiv 2405.18570). `uniformity` and `cross_uniformity` are tensors with
gradients, over the batch of all processes. The others are numbers computed from plain arrays, numpy's or torch's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import batch_logsumexp, global_logsumexp, place, world
from counterpoint.core.operands import scaled, unit, with_bias
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Diagonal
from counterpoint.core.transforms import traced
from counterpoint.core.world import over_group


def _log_mean(u: Tensor, v: Tensor | None, total: int, sharpness: float) -> Tensor:
    """Log of the mean over pairs i != j of exp(-sharpness |a - b|^2), of rows of length 1 or 0; v None: pairs of u with itself."""
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b: no distance, whose gradient at zero is NaN, is ever taken.
    empty = [row_is_zero(x) for x in (u, u if v is None else v)]
    # On a GPU the processor would wait for the answer: the longer way there costs less.
    if traced() or u.is_cuda or bool(torch.cat(empty).any()) or world()[1] > 1:
        # A row of zeros lies at the distance 1 from a unit row and 0 from another: its lengths make up for what 2t takes.
        query, key = with_bias(
            scaled(u, 1 / (2 * sharpness)),
            u if v is None else v,
            row=sharpness * empty[0].to(u.dtype),
            column=sharpness * empty[1].to(u.dtype),
        )
        rows = batch_logsumexp(query, key, exclude=Diagonal()).rows
    elif v is None:
        rows = batch_logsumexp(scaled(u, 1 / math.sqrt(2 * sharpness)), exclude=Diagonal()).rows
    else:
        rows = batch_logsumexp(scaled(u, 1 / (2 * sharpness)), v, exclude=Diagonal()).rows
    own = rows.logsumexp(0) if len(rows) else rows.sum() - math.inf
    return global_logsumexp(own) - 2 * sharpness - math.log(total * (total - 1))


def row_is_zero(u: Float[Tensor, "n dim"]) -> Bool[Tensor, " n"]:
    """Tell which of these unit rows are rows of zeros."""
    return (u.detach() == 0).all(1)


@over_group
@full_precision
def uniformity(x: Float[Tensor, "n dim"], sharpness: float = 2.0) -> Float[Tensor, ""]:
    """Measure how evenly rows fill the sphere: log mean over pairs i != j of exp(-sharpness |x~_i - x~_j|^2), x~ of unit length.

    Args:
        x: rows, normalised here; for a row of zeros see `core.operands.unit`.
        sharpness: > 0, factor of the squared distances.

    0 when all are equal, at least -4 sharpness. Many rows in many dimensions reach -2 sharpness at best. One row has no pair: 0.
    Raises ValueError for an empty batch. Source: Wang and Isola 2020.

    >>> uniformity(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor(-4.)
    """
    need_alike("n dim", x=x)
    return unit_uniformity(unit(x), sharpness)


@full_precision
def unit_uniformity(u: Float[Tensor, "n dim"], sharpness: float = 2.0) -> Float[Tensor, ""]:
    """Compute `uniformity` of rows that are already unit rows (or zero)."""
    need_positive(sharpness=sharpness)
    total = place(len(u), u.device).total
    return u.sum() * 0 if total < 2 else _log_mean(u, None, total, sharpness)


@over_group
@full_precision
def cross_uniformity(x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"], sharpness: float = 2.0) -> Float[Tensor, ""]:
    """Measure how far mismatched rows lie apart: log mean over i != j of exp(-sharpness |x~_i - y~_j|^2).

    Args:
        x, y: rows, normalised here; row i of x belongs to row i of y. For a row of zeros see `core.operands.unit`.
        sharpness: > 0, factor of the squared distances.

    One row: 0. Raises ValueError for shapes that differ and for an empty batch.
    Source: Fahim et al., arXiv 2405.18570 (L_XUniform).

    >>> cross_uniformity(torch.eye(2), torch.eye(2))
    tensor(-4.)
    """
    need_alike("n dim", x=x, y=y)
    return unit_cross_uniformity(unit(x), unit(y), sharpness)


@full_precision
def unit_cross_uniformity(
    u: Float[Tensor, "n dim"], v: Float[Tensor, "n dim"], sharpness: float = 2.0
) -> Float[Tensor, ""]:
    """Compute `cross_uniformity` of rows that are already unit rows (or zero)."""
    need_positive(sharpness=sharpness)
    total = place(len(u), u.device).total
    return (u.sum() + v.sum()) * 0 if total < 2 else _log_mean(u, v, total, sharpness)


# ------------------------------------------------------------------------------------------------- figures of plain arrays


def _unit(name: str, x: Any) -> Tensor:
    rows = torch.as_tensor(x).detach().double()
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"{name} must be [n, dim] with rows, got {list(rows.shape)}")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{name} holds NaN or infinite values")
    return unit(rows)


def _pairs(u: Any, v: Any) -> tuple[Tensor, Tensor]:
    u, v = _unit("u", u), _unit("v", v)
    need_alike("n dim", u=u, v=v)
    if len(u) < 2:
        raise ValueError("u and v must hold at least 2 pairs: one pair does not show a gap")
    return u, v


def linear_separability(u: Any, v: Any, *, seed: int = 0) -> float:
    """Measure how well logistic regression tells rows of u from rows of v: fit it on 80 % of the pairs, test on the rest.

    1: a plane separates the modalities; 0.5 is chance: there is no gap. Rows are normalised here. The regression is
    scikit-learn's with its defaults, as in the paper.

    Args:
        u, v: [n, dim] paired rows. Their order does not matter: pairs are sorted by their values before the split.
        seed: draws the split.

    Raises ValueError for less than two pairs, for shapes that differ and for NaN.
    """
    from sklearn.linear_model import LogisticRegression

    u, v = _pairs(u, v)
    sorted_pairs = np.lexsort(torch.cat([u, v], 1).numpy().T[::-1])
    order = sorted_pairs[np.random.default_rng(seed).permutation(len(u))]
    parts = np.split(order, [max(1, int(0.8 * len(u)))])
    (fit, fit_label), (held, held_label) = (
        (torch.cat([u[part], v[part]]).numpy(), np.repeat([0, 1], len(part))) for part in parts
    )
    return float(LogisticRegression(max_iter=1000).fit(fit, fit_label).score(held, held_label))


def explained_variance_ratios(x: Any) -> NDArray[np.float64]:
    """Compute the shares of variance along the normalised rows' principal axes, largest first; zeros if all rows are equal."""
    rows = _unit("x", x)
    energy = torch.linalg.svdvals(rows - rows.mean(0)).square()
    return np.asarray((energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)).numpy())


def _spread(u: Tensor, v: Tensor | None = None) -> float:
    """Compute `uniformity`, or with v `cross_uniformity`, of these unit rows alone: every process has the whole set."""
    other = u if v is None else v
    query, key = with_bias(
        4.0 * u, other, row=2 * row_is_zero(u).to(u.dtype), column=2 * row_is_zero(other).to(u.dtype)
    )
    rows = pair_logsumexp(query, key, exclude=Diagonal()).rows
    return float(rows.logsumexp(0)) - 4 - math.log(len(u) * (len(u) - 1))


def gap_metrics(u: Any, v: Any) -> dict[str, float]:
    """Compute the measures of the gap between paired embeddings u (for instance images) and v (texts), normalised here.

    centroid_distance           |mean(u) - mean(v)|
    linear_separability         see there; 0.5 is no gap
    image_uniformity_loss       `uniformity` of u; text_uniformity_loss of v; total_uniformity_loss is their mean
    cross_encoder_uniform_loss  `cross_uniformity`
    alignment                   mean |u_i - v_i|^2 over the pairs

    The names are those of the authors' evaluator. Raises ValueError for less than two pairs, for shapes that differ and for
    NaN.

    >>> x = torch.eye(4)
    >>> gap_metrics(x, x)["centroid_distance"]
    0.0
    """
    u, v = _pairs(u, v)
    image, text = _spread(u), _spread(v)
    return {
        "centroid_distance": float((u.mean(0) - v.mean(0)).norm()),
        "linear_separability": linear_separability(u, v),
        "image_uniformity_loss": image,
        "text_uniformity_loss": text,
        "total_uniformity_loss": (image + text) / 2,
        "cross_encoder_uniform_loss": _spread(u, v),
        "alignment": float((u - v).square().sum(1).mean()),
    }
