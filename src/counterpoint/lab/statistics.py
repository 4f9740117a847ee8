"""Compute paired t intervals, Holm's correction, verdicts, and the smallest detectable difference of an experiment.

A contrast is a list of differences, one for each seed. A positive difference is a gain. Three tests judge a contrast, each
by the bounds of its interval:

    superiority       holds where low > margin
    non-inferiority   holds where low > -margin
    equivalence       holds where low > -margin and high < margin

Holm's step-down procedure is from the Scandinavian Journal of Statistics 6, 1979. It limits the probability of any false
"holds" in a family of contrasts to `ERROR`, whatever their dependence. Each contrast's interval has the level that the
procedure gives it. Therefore the bounds and the adjusted p-values give the same verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

ERROR = 0.025  # one-sided; the two-sided interval of a single contrast is at 95 %
POWER = 0.8
MANY_SEEDS = 30  # an effect that needs more seeds counts as no difference
# A spread below this share of the mean's absolute value is rounding, not variation: float32 has 24 bits.
ROUNDING = 2.0**-20

Test = Literal["superiority", "non-inferiority", "equivalence"]
TESTS: tuple[Test, ...] = ("superiority", "non-inferiority", "equivalence")

HOLDS, SMALLER, NONE, REVERSED, OPEN = "holds", "smaller", "no difference", "reversed", "undecided"
PARTLY = "partly"


@dataclass(frozen=True)
class Contrast:
    """Differences by seed and the test that judges them.

    Args:
        differences: [seeds] gains; positive is better.
        test: "superiority", "non-inferiority" or "equivalence"; see the module's docstring.
        margin: Margin in the unit of the metric, at least 0; above 0 for non-inferiority and equivalence.
    """

    differences: Sequence[float]
    test: Test = "superiority"
    margin: float = 0.0


@dataclass(frozen=True)
class Finding:
    """The outcome of one contrast.

    Args:
        mean: Mean difference.
        low, high: Bounds of the interval; None with a single seed.
        level: Level of that interval, two-sided, in 0..1.
        p: p-value against the margin, before Holm's correction; None with a single seed.
        p_holm: p-value after Holm's correction; None with a single seed.
        verdict: `holds`, `smaller` (better, by less than the margin), `no difference`, `reversed` or `undecided`.
        detectable: Smallest difference that would be found in four of five repetitions at this level and spread; None
            where undefined.
    """

    mean: float
    low: float | None
    high: float | None
    level: float
    p: float | None
    p_holm: float | None
    verdict: str
    detectable: float | None


def interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return (mean, low, high) of the two-sided t interval at `level`. For fewer than two seeds the bounds are nan."""
    from scipy import stats

    values = np.asarray(differences, float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.5 + level / 2, len(values) - 1)) * _standard_error(values)
    return mean, mean - half, mean + half


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def p_value(contrast: Contrast) -> float:
    """Return the one-sided p-value of a contrast against its margin; nan for fewer than two seeds."""
    from scipy import stats

    values = np.asarray(contrast.differences, float)
    if len(values) < 2:
        return math.nan
    error, mean = _standard_error(values), float(values.mean())

    def above(bound: float) -> float:
        if error == 0:
            return 0.0 if mean > bound else 1.0
        return float(stats.t.sf((mean - bound) / error, len(values) - 1))

    def below(bound: float) -> float:
        if error == 0:
            return 0.0 if mean < bound else 1.0
        return float(stats.t.cdf((mean - bound) / error, len(values) - 1))

    if contrast.test == "superiority":
        return above(contrast.margin)
    if contrast.test == "non-inferiority":
        return above(-contrast.margin)
    return max(above(-contrast.margin), below(contrast.margin))


def holm(p_values: Sequence[float], error: float = ERROR) -> tuple[list[float], list[float]]:
    """Return Holm's adjusted p-values, and the one-sided error at which each contrast is judged.

    The smallest of k p-values is judged at error / k, the next at error / (k - 1), and so on. When one fails, all larger
    ones are judged at the same error and fail, too.
    """
    count = len(p_values)
    order = sorted(range(count), key=lambda i: (math.isnan(p_values[i]), p_values[i]))
    adjusted, errors = [math.nan] * count, [error] * count
    largest, failed = 0.0, None
    for rank, index in enumerate(order):
        p = p_values[index]
        largest = max(largest, min(1.0, p * (count - rank))) if not math.isnan(p) else math.nan
        adjusted[index] = largest
        own = error / (count - rank)
        errors[index] = own if failed is None else failed
        if failed is None and not p < own:
            failed = own
    return adjusted, errors


def judge(contrasts: Sequence[Contrast], error: float = ERROR, *, two_sided: bool = False) -> list[Finding]:
    """Judge a family of contrasts together, by intervals at the levels of Holm's procedure.

    Args:
        contrasts: The family of contrasts.
        error: Probability of any false "holds" in the family, in 0..1.
        two_sided: Judge both directions, for a question without an expected answer. The p-values are then two-sided.
    """
    p_values = [p_value(contrast) for contrast in contrasts]
    if two_sided:
        p_values = [min(p, 1 - p) for p in p_values]
    adjusted, errors = holm(p_values, error)
    found = []
    for contrast, p, p_holm, own in zip(contrasts, p_values, adjusted, errors, strict=True):
        level = 1 - 2 * own
        mean, low, high = interval(contrast.differences, level)
        alone = math.isnan(low)
        found.append(
            Finding(
                mean=mean,
                low=None if alone else low,
                high=None if alone else high,
                level=level,
                p=None if alone else min(1.0, p * (1 + two_sided)),
                p_holm=None if alone else min(1.0, p_holm * (1 + two_sided)),
                verdict=verdict(contrast.test, contrast.margin, low, high),
                detectable=None if alone else detectable(contrast.differences, level),
            )
        )
    return found


def verdict(test: Test, margin: float, low: float, high: float) -> str:
    """Return the verdict of one contrast, from the bounds of its interval."""
    if math.isnan(low):
        return f"{OPEN}: one seed has no interval"
    if test == "superiority":
        if low > margin:
            return HOLDS
        return SMALLER if low > 0 else REVERSED if high < 0 else NONE
    if test == "non-inferiority":
        return HOLDS if low > -margin else REVERSED if high < -margin else OPEN
    if low > -margin and high < margin:
        return HOLDS
    return REVERSED if low > margin or high < -margin else OPEN


def of_all(verdicts: Sequence[str]) -> str:
    """Combine the verdicts of a sentence's conjuncts into the sentence's verdict.

    - `holds`: every conjunct holds.
    - `partly`: some conjuncts hold, or a gain is shown that is smaller than its margin.
    - `reversed`: no conjunct holds and at least one is reversed.
    - `no difference`: all other cases.
    """
    if any(said.startswith(f"{OPEN}:") for said in verdicts):
        return next(said for said in verdicts if said.startswith(f"{OPEN}:"))
    if verdicts and all(said == HOLDS for said in verdicts):
        return HOLDS
    if any(said in (HOLDS, SMALLER) for said in verdicts):
        return PARTLY
    return REVERSED if REVERSED in verdicts else NONE


def detectable(differences: Sequence[float], level: float = 0.95, power: float = POWER) -> float:
    """Return the smallest true difference that an experiment of this spread and size finds with this power.

    `differences` give the spread and the number of seeds; at least two are needed.
    """
    values = np.asarray(differences, float)
    return _shift(len(values) - 1, round(level, 12), power) * _standard_error(values)


@cache
def _shift(freedom: int, level: float, power: float) -> float:
    """Return the difference, in standard errors, that a t test of this level finds with this power."""
    from scipy import optimize, stats

    critical = float(stats.t.ppf(0.5 + level / 2, freedom))

    def short(shift: float) -> float:
        return float(stats.nct.sf(critical, freedom, shift)) - power

    top = critical + 5.0
    while short(top) < 0:
        top *= 2
    return float(optimize.brentq(short, 0.0, top))


def seeds_needed(differences: Sequence[float], most: int = 1000, *, level: float = 0.95) -> int | None:
    """Count the seeds with which a paired t test finds the observed effect in four of five repetitions.

    Args:
        differences: Paired differences, at least two. Their spread is assumed to be the true one.
        most: Largest number of seeds to try.
        level: Level of the two-sided interval, in 0..1.

    Returns None where `most` seeds do not suffice.
    """
    from scipy import stats

    values = np.asarray(differences, float)
    mean, spread = abs(float(values.mean())), float(values.std(ddof=1))
    if spread <= 1e-12 * mean:  # equal up to rounding
        return 2 if mean else None
    for n in range(2, most + 1):
        critical = stats.t.ppf(0.5 + level / 2, n - 1)
        if stats.nct.sf(critical, n - 1, mean / spread * math.sqrt(n)) >= POWER:
            return n
    return None


def constant(values: Sequence[float]) -> bool:
    """Return whether values are equal to the rounding of float32: they vary by less than `ROUNDING` of their size."""
    found = np.asarray(values, float)
    return bool(np.ptp(found) <= ROUNDING * max(float(np.abs(found).max()), 1e-30))
