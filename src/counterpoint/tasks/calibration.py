"""Turn the scores of a detector into probabilities, and choose its threshold, from labelled videos.

A calibration is a map from a raw score to a probability. It never decreases, so the ranking stays. Isotonic regression needs many
videos; Platt's method, a logistic regression on the score's logit, has two numbers. Folds are videos, because the snippets of one
video resemble each other. Sources: Platt 1999; Zadrozny and Elkan 2002.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterpoint.errors import DataError, RunError
from counterpoint.words import counted

ISOTONIC_VIDEOS = 100  # with fewer videos, isotonic regression follows their chance differences
ISOTONIC_SNIPPETS = 1000  # snippets of either kind that it needs, too
LEAST = 4  # videos with a violent moment, and videos without: fewer allow no interval
FOLDS = 5
METHODS = ("auto", "isotonic", "platt")
Rows = NDArray[np.float64]


class Watched(NamedTuple):
    """The scores of one labelled video, and its truth."""

    name: str
    score: Rows  # [T] raw fused probability
    truth: NDArray[np.bool_]  # [T] whether the middle of the snippet is violent
    seconds: float  # of a snippet

    @property
    def moments(self) -> list[tuple[int, int]]:
        """The true moments, as ranges [first, stop) of snippets."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self.truth.astype(np.int8), [0]])))
        return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True)
class Calibration:
    """A map from raw scores to probabilities, and a threshold."""

    method: str  # "isotonic" or "platt"
    x: list[float]  # isotonic: raw scores of the knots; platt: slope and intercept on the logit
    y: list[float]  # isotonic: probabilities of the knots; platt: empty
    threshold: float  # of the calibrated probability, 0 to 1
    weights: str  # SHA-256 of the run's weights
    facts: dict[str, Any] = field(default_factory=dict)  # goal, data, figures with intervals

    def __call__(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Map raw scores to probabilities of the same shape. NaN stays NaN."""
        raw = np.asarray(raw, np.float64)
        if self.method == "isotonic":
            return np.where(np.isnan(raw), np.nan, np.interp(raw, self.x, self.y)).astype(np.float32)
        slope, intercept = self.x
        with np.errstate(over="ignore"):
            return (1 / (1 + np.exp(-(slope * logit(raw) + intercept)))).astype(np.float32)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_dict(cls, kept: Mapping[str, Any]) -> Calibration:
        """Make a calibration from the fields that `as_dict` wrote. RunError when they are not those of a calibration."""
        try:
            made = cls(**{k: kept[k] for k in ("method", "x", "y", "threshold", "weights")}, facts=dict(kept["facts"]))
            whole = made.method in METHODS[1:] and len(made.x) == (2 if made.method == "platt" else len(made.y))
            rising = made.method == "platt" or ((np.diff(made.x) > 0).all() and (np.diff(made.y) >= 0).all())
            if whole and rising and len(made.x) and 0 <= made.threshold <= 1:
                return made
        except (KeyError, TypeError, ValueError):
            pass
        raise RunError("is damaged: it holds no calibration; run counterpoint calibrate again")


def logit(score: NDArray[Any]) -> Rows:
    """Return log(s / (1 - s)) of scores, which are first moved into [1e-6, 1 - 1e-6]."""
    clipped = np.clip(np.asarray(score, np.float64), 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


def check_videos(videos: Sequence[Watched]) -> None:
    """Raise DataError when labelled videos are too few to calibrate with, or lack violent moments or calm videos."""
    positive = sum(bool(video.truth.any()) for video in videos)
    if not positive:
        raise DataError(
            f"none of the {counted(len(videos), 'validation video')} has a violent moment; add some to valid/violent, and rows "
            "to truth.csv"
        )
    negative = len(videos) - positive
    if min(positive, negative) < LEAST:
        raise DataError(
            f"the validation videos are too few: {positive} with a violent moment and {negative} without, at least {LEAST} of "
            "each are needed; add videos to valid/, or take a larger share of training: --data 'videos:DIR?valid=0.3'"
        )


def chosen_method(videos: Sequence[Watched]) -> str:
    """Choose isotonic regression for many videos, Platt's method for few."""
    truth = np.concatenate([video.truth for video in videos])
    many = len(videos) >= ISOTONIC_VIDEOS and min(truth.sum(), (~truth).sum()) >= ISOTONIC_SNIPPETS
    return "isotonic" if many else "platt"


def fitted(videos: Sequence[Watched], method: str) -> tuple[list[float], list[float]]:
    """Fit a map by "isotonic" or "platt". Return the fields `x` and `y` of a `Calibration`.

    Raises DataError where higher scores are not more often violent: no map that keeps the ranking helps then.
    """
    score = np.concatenate([video.score for video in videos])
    truth = np.concatenate([video.truth for video in videos]).astype(np.float64)
    # Every video counts the same, however long it is.
    weight = np.concatenate([np.full(len(video.score), 1 / len(video.score)) for video in videos])
    wrong = DataError(
        "higher scores of this run are not more often violent on these videos; look for swapped labels, list the moments of "
        "the valid videos in truth.csv, or train again"
    )
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(score, truth, sample_weight=weight)
        x, y = model.X_thresholds_, model.y_thresholds_
        if y[0] == y[-1]:
            raise wrong
        keep = np.concatenate([[True], np.diff(x) > 0])
        return [float(v) for v in x[keep]], [float(v) for v in y[keep]]
    from sklearn.linear_model import LogisticRegression

    line = LogisticRegression(C=100.0).fit(logit(score)[:, None], truth, sample_weight=weight * len(videos))
    slope, intercept = float(line.coef_[0, 0]), float(line.intercept_[0])
    if slope <= 0:
        raise wrong
    return [slope, intercept], []


def crossed(videos: Sequence[Watched], method: str) -> list[NDArray[np.float32]]:
    """Return each video's calibrated scores, by a map that was fitted without that video's fold."""
    from sklearn.model_selection import StratifiedKFold

    labels = [int(video.truth.any()) for video in videos]
    folds = StratifiedKFold(min(FOLDS, *np.bincount(labels, minlength=2)), shuffle=True, random_state=0)
    found: dict[int, NDArray[np.float32]] = {}
    for rest, held in folds.split(labels, labels):
        x, y = fitted([videos[i] for i in rest], method)
        mapped = Calibration(method, x, y, 0.5, "")
        found |= {int(i): mapped(videos[i].score) for i in held}
    return [found[i] for i in range(len(videos))]


class Counts(NamedTuple):
    """What each threshold of a grid finds in each video."""

    grid: Rows  # [G] thresholds, rising
    moments: NDArray[np.int64]  # [V] true moments
    found: NDArray[np.int64]  # [V, G] true moments with a snippet above the threshold
    alarms: NDArray[np.int64]  # [V, G] moments found that touch no true one
    hours: Rows  # [V] hours without violence

    def recall(self, weight: NDArray[Any]) -> Rows:
        """Return the share of true moments found, [..., G], for weights of videos [..., V]."""
        return (weight @ self.found) / np.maximum(1, weight @ self.moments)[..., None]

    def false_alarms(self, weight: NDArray[Any]) -> Rows:
        """Return the false alarms in an hour without violence, [..., G], for weights of videos [..., V]."""
        return (weight @ self.alarms) / np.maximum(1e-9, weight @ self.hours)[..., None]

    def reaching(self, weight: NDArray[Any], *, recall: float | None, alarms: float | None) -> NDArray[np.int64]:
        """Return the grid's index of the threshold for a goal, [...].

        For a recall it is the highest threshold that reaches it. For false alarms an hour it is the lowest one from which on
        no higher threshold gives more.
        """
        if recall is not None:
            enough = self.recall(weight) >= recall - 1e-9
            return np.where(enough.any(-1), len(self.grid) - 1 - enough[..., ::-1].argmax(-1), 0)
        assert alarms is not None
        over = self.false_alarms(weight) > alarms + 1e-9
        return np.where(over.any(-1), np.minimum(len(self.grid) - over[..., ::-1].argmax(-1), len(self.grid) - 1), 0)


def counts(videos: Sequence[Watched], scores: Sequence[NDArray[Any]], most: int = 400) -> Counts:
    """Count what thresholds find in videos with the given scores; at most about `most` thresholds."""
    every = np.concatenate([np.asarray(s, np.float64) for s in scores])
    peaks = [float(s[a:b].max()) for v, s in zip(videos, scores, strict=True) for a, b in v.moments]
    levels = np.unique(np.concatenate([np.quantile(every, np.linspace(0, 1, most)), peaks]))
    # Moments lie strictly above their threshold, so thresholds lie between the levels, and one above all.
    grid = np.concatenate([[0.0], (levels[:-1] + levels[1:]) / 2, [min(1.0, levels[-1])]])
    found = np.zeros((len(videos), len(grid)), np.int64)
    alarms = np.zeros_like(found)
    for row, (video, score) in enumerate(zip(videos, scores, strict=True)):
        for a, b in video.moments:
            found[row] += score[a:b].max() > grid
        alarms[row] = _false(np.asarray(score, np.float64) > grid[:, None], video.truth)
    return Counts(
        grid,
        np.array([len(video.moments) for video in videos]),
        found,
        alarms,
        np.array([(~video.truth).sum() * video.seconds / 3600 for video in videos]),
    )


def _false(above: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Count in each row of `above` [G, T] the stretches that touch no true snippet, joined as `intervals` joins them."""
    joined = above.copy()
    joined[:, 1:-1] |= above[:, :-2] & above[:, 2:]
    begins = joined & ~np.pad(joined, ((0, 0), (1, 0)))[:, :-1]
    numbers = np.cumsum(begins.ravel()).reshape(begins.shape)  # of the stretch, over all rows
    touched = np.bincount(numbers[joined & truth], minlength=int(numbers[-1, -1]) + 1) > 0
    return (begins & ~touched[numbers]).sum(1)


def resampled(videos: Sequence[Watched], times: int = 1000, seed: int = 0) -> NDArray[np.int64]:
    """Draw the weights of videos in bootstrap samples, [times, V]. Violent and calm videos keep their numbers."""
    rng = np.random.default_rng(seed)
    violent = np.array([bool(video.truth.any()) for video in videos])
    weight = np.zeros((times, len(videos)), np.int64)
    for kind in (violent, ~violent):
        rows = np.flatnonzero(kind)
        weight[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), times)
    return weight


def reliability(
    probability: NDArray[Any], truth: NDArray[Any], bins: int = 10
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return bins of about equal size, and measures of calibration.

    Each bin has its mean `probability`, the `share` of snippets that are violent, and its `size`. The measures are `brier`, the
    mean squared error, and `ece`, the expected calibration error over the bins.
    """
    order = np.argsort(probability, kind="stable")
    p, t = np.asarray(probability, np.float64)[order], np.asarray(truth, np.float64)[order]
    rows = [
        {"probability": float(p[part].mean()), "share": float(t[part].mean()), "size": len(part)}
        for part in np.array_split(np.arange(len(p)), min(bins, len(p)))
    ]
    error = sum(abs(row["probability"] - row["share"]) * row["size"] for row in rows) / len(p)
    return rows, {"brier": float(((p - t) ** 2).mean()), "ece": float(error)}
