"""Measure what each of several spaces knows: a probe for every space and every known cause, as a matrix.

A classified cause (class, attribute, set) is probed by logistic regression: accuracy. A continuous cause is probed by kernel
ridge regression: R^2 on held-out pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from counterpoint.data.images import Indices
from counterpoint.engine.survey import Survey
from counterpoint.tasks.measures import linear_probe

LEARNED = 800  # training rows of a kernel ridge regression
GAMMA, ALPHA = 0.15, 0.1


class Cause(NamedTuple):
    """What is known of the training and of the measured pictures: class numbers [n], -1 for none, or numbers [n, k]."""

    train: Tensor
    asked: Tensor

    @property
    def chance(self) -> float | None:
        """The share of the most frequent class of measured pictures; None for numbers, and where no class is known."""
        known = self.asked[self.asked >= 0]
        return None if self.asked.is_floating_point() or not len(known) else float(known.bincount().max() / len(known))


def known_causes(
    survey: Survey, at: Mapping[str, Indices], member: Mapping[str, Bool[Tensor, " n"]]
) -> dict[str, Cause]:
    """Return what the data know of pictures of one set: their class, where there is one, and their causes.

    Args:
        survey: access to the data.
        at: positions of the training and of the measured pictures, by the split; in this order.
        member: whether each of these pictures is of the set; of others nothing is known.
    """
    known: dict[str, Mapping[str, Tensor]] = {part: survey.known(part) for part in at}
    labels = {part: survey.split(part).labels for part in at}
    if all(label is not None for label in labels.values()):
        known = {part: {"class": torch.from_numpy(labels[part])} | dict(known[part]) for part in at}
    causes = {}
    for name in list(known.values())[-1]:
        pair = []
        for part, rows in at.items():
            values = known[part][name][torch.from_numpy(rows)]
            absent = float("nan") if values.is_floating_point() else -1
            pair.append(torch.where(member[part].view(-1, *(1,) * (values.ndim - 1)), values, absent))
        causes[name] = Cause(*pair)
    return causes


def ridge_r2(
    features: Float[Tensor, "n dim"],
    causes: Float[Tensor, "n k"],
    test_features: Float[Tensor, "m dim"],
    test_causes: Float[Tensor, "m k"],
    gamma: float = GAMMA,
    alpha: float = ALPHA,
) -> float:
    """Fit kernel ridge regression on standardised features; return the mean R^2 of the k numbers on the test rows.

    Args:
        features, causes: rows to learn from; the first 800 are used.
        test_features, test_causes: rows to predict, at least 2.
        gamma: > 0, the kernel is exp(-gamma |x - y|^2); by default 0.15.
        alpha: > 0, ridge; by default 0.1.

    1 is perfect, 0 no better than the mean; it may be negative.
    """
    x, y = features[:LEARNED].double(), causes[:LEARNED].double()
    mean, spread = x.mean(0), x.std(0, correction=0).clamp(min=1e-9)
    x, asked, wanted = (x - mean) / spread, (test_features.double() - mean) / spread, test_causes.double()
    level = y.mean(0)
    gram = (-gamma * torch.cdist(x, x).square()).exp()
    weight = torch.linalg.solve(gram + alpha * torch.eye(len(x), dtype=x.dtype), y - level)
    found = level + (-gamma * torch.cdist(asked, x).square()).exp() @ weight
    left = (found - wanted).square().sum(0)
    return float((1 - left / (wanted - wanted.mean(0)).square().sum(0).clamp(min=1e-12)).mean())


def probe_matrix(
    spaces: Mapping[str, tuple[Tensor, Tensor]], causes: Mapping[str, Cause]
) -> dict[tuple[str, str], float]:
    """Measure every cause from every space: (space, cause) -> accuracy, or R^2 of a continuous cause.

    Args:
        spaces: name -> features [n, dim] of training and [m, dim] of measured pictures.
        causes: name -> what is known of them. One that no training or no measured picture has is left out.
    """
    found = {}
    for name, cause in causes.items():
        continuous = cause.train.is_floating_point()
        here = torch.isfinite(cause.train).all(1) if continuous else cause.train >= 0
        there = torch.isfinite(cause.asked).all(1) if continuous else cause.asked >= 0
        if not bool(here.any()) or int(there.sum()) < 2:
            continue
        for space, (train, asked) in spaces.items():
            four = train[here], cause.train[here], asked[there], cause.asked[there]
            found[space, name] = ridge_r2(*four) if continuous else linear_probe(*four)[0]
    return found


def matrix_figure(found: Mapping[tuple[str, str], float], chance: Mapping[str, float], caption: str) -> dict[str, Any]:
    """Return the matrix as a table for a run's page: a row for each space, a column for each cause."""
    spaces, causes = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 1))
    rows: list[list[Any]] = [[space, *(found[space, cause] for cause in causes)] for space in spaces]
    rows.append(["without features", *(chance.get(cause, 0.0) for cause in causes)])
    return {"kind": "table", "columns": ["space", *causes], "rows": rows, "caption": caption}
