"""Measure features and predictions against real-valued targets: a ridge probe, errors by frequency, the order of distances."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-5, 3))  # over the number of rows; features have deviation 1
COMPARED = 1000  # maximum number of items whose distances are ranked


class Ridge(NamedTuple):
    """A linear map from features to a target: features @ weight + bias."""

    weight: Float[Tensor, " dim"]
    bias: Float[Tensor, ""]
    ridge: float

    def __call__(self, features: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Predict the targets, in float64."""
        return features.double() @ self.weight + self.bias


def fit_ridge(
    features: Float[Tensor, "n dim"],
    targets: Float[Tensor, " n"],
    watched: Float[Tensor, "m dim"],
    watched_targets: Float[Tensor, " m"],
    ridges: tuple[float, ...] = RIDGES,
) -> Ridge:
    """Fit ridge regression on standardised features, and choose the ridge by the mean absolute error on watched items.

    Args:
        features, targets: training items, at least one.
        watched, watched_targets: items to choose by, at least one.
        ridges: candidates >= 0, each over the number of training items. Of equally good ones the largest is chosen.

    >>> x = torch.arange(8.0)[:, None]
    >>> fit_ridge(x, 2 * x[:, 0] + 1, x, 2 * x[:, 0] + 1)(torch.tensor([[10.0]])).round(decimals=2)
    tensor([21.], dtype=torch.float64)
    """
    x, y = features.double(), targets.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    deviation = torch.where(deviation > 1e-12 * x.abs().amax(), deviation, torch.inf)  # constant features have no part
    x, centre = (x - mean) / deviation, y.mean()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    along = vectors.T @ (x.T @ (y - centre)) / len(x)
    found: list[tuple[float, Ridge]] = []
    for ridge in ridges:
        weight = vectors @ (along / (values.clamp(min=0) + ridge)) / deviation
        made = Ridge(weight, centre - mean @ weight, ridge)
        found.append((float((made(watched) - watched_targets.double()).abs().mean()), made))
    return min(reversed(found), key=lambda pair: pair[0])[1]


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each number; equal numbers have their mean rank."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place].double()


def rank_correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Compute Spearman's rank correlation of two lists of numbers; 0 where either is constant.

    >>> round(rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 8.0, 9.0])), 6)
    1.0
    """
    return correlation(_ranks(a), _ranks(b))


def correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Compute Pearson's correlation of two lists of numbers; 0 where either is constant."""
    a, b = (x.double() - x.double().mean() for x in (a, b))
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else 0.0


def distance_order(features: Float[Tensor, "n dim"], targets: Float[Tensor, " n"]) -> float:
    """Compute Spearman's correlation of feature distances with target distances, over all pairs of items.

    Args:
        features: rows, compared by the Euclidean distance of unit rows.
        targets: their targets. Of more than COMPARED items, as many are taken at equal steps.

    >>> turns = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.5, 3.0])
    >>> round(distance_order(torch.stack([turns.cos(), turns.sin()], 1), turns), 6)
    1.0
    """
    if len(features) < 3:
        return 0.0
    rows = torch.linspace(0, len(features) - 1, min(len(features), COMPARED)).long()
    x, y = F.normalize(features[rows].double(), dim=1), targets[rows].double()
    pairs = torch.triu_indices(len(x), len(x), 1)
    # Rounding would order equal distances.
    near = torch.pdist(x).float()
    return rank_correlation(near, (y[pairs[0]] - y[pairs[1]]).abs())


def shot_regions(
    targets: Float[Tensor, " m"], trained: Float[Tensor, " n"], width: float, many: int, few: int
) -> dict[str, Bool[Tensor, " m"]]:
    """Divide items by how many training items have a target in their bin: "many", "medium" and "few".

    Args:
        targets: targets of the items.
        trained: targets of the training items.
        width: width of a bin > 0; bins begin at multiples of it.
        many: an item of the region "many" has more training items in its bin than this.
        few: one of "few" has fewer than this; `few` is at most `many`.

    Source: Yang et al., arXiv 2102.09554, with 100 and 20.

    >>> {k: v.tolist() for k, v in shot_regions(torch.tensor([0.5, 3.5]), torch.zeros(9), 1.0, 5, 1).items()}
    {'many': [True, False], 'medium': [False, False], 'few': [False, True]}
    """
    bins, counts = (trained.double() / width).floor().unique(return_counts=True)
    own = (targets.double() / width).floor()
    at = torch.searchsorted(bins, own).clamp(max=len(bins) - 1)
    there = torch.where(bins[at] == own, counts[at], 0)
    return {"many": there > many, "medium": (there <= many) & (there >= few), "few": there < few}
