"""Intervals, Holm's correction, verdicts: against values by hand, and by their error rates over many simulated experiments."""

from __future__ import annotations

import math

import numpy as np
import pytest

from counterpoint.lab import statistics as room
from counterpoint.lab.statistics import Contrast


def test_interval_is_the_paired_t_interval():
    values = [0.02, 0.05, -0.01, 0.04, 0.03]
    mean, low, high = room.interval(values)
    assert mean == pytest.approx(0.026)
    # t(0.975; 4) = 2.7764, standard deviation 0.02302, by hand
    half = 2.7764 * 0.0230217 / math.sqrt(5)
    assert (low, high) == (pytest.approx(mean - half, abs=1e-5), pytest.approx(mean + half, abs=1e-5))
    assert math.isnan(room.interval([0.5])[1])


def test_interval_covers_the_truth_at_its_level():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        _, low, high = room.interval(rng.normal(0.3, 1.0, 5), 0.9)
        hits += low <= 0.3 <= high
    assert 0.88 < hits / 2000 < 0.92


@pytest.mark.parametrize(
    ("test", "margin", "low", "high", "said"),
    [
        ("superiority", 0.0, 0.01, 0.2, "holds"),
        ("superiority", 0.05, 0.01, 0.2, "smaller"),
        ("superiority", 0.0, -0.2, -0.01, "reversed"),
        ("superiority", 0.0, -0.1, 0.2, "no difference"),
        ("non-inferiority", 0.05, -0.04, -0.01, "holds"),
        ("non-inferiority", 0.05, -0.06, 0.2, "undecided"),
        ("non-inferiority", 0.05, -0.2, -0.06, "reversed"),
        ("equivalence", 0.05, -0.04, 0.04, "holds"),
        ("equivalence", 0.05, -0.04, 0.06, "undecided"),
        ("equivalence", 0.05, 0.06, 0.2, "reversed"),
        ("superiority", 0.0, math.nan, math.nan, "undecided: one seed has no interval"),
    ],
)
def test_verdict_reads_the_bounds_of_the_interval(test, margin, low, high, said):
    assert room.verdict(test, margin, low, high) == said


def test_holm_adjusts_as_in_the_textbook():
    # 0.01, 0.04, 0.03, 0.005: Holm's adjusted values by hand are 0.03, 0.06, 0.06, 0.02.
    adjusted, errors = room.holm([0.01, 0.04, 0.03, 0.005], error=0.05)
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # 0.005 at 0.05/4, 0.01 at 0.05/3, 0.03 at 0.05/2 fails, and so does the last, at the same error.
    assert errors == pytest.approx([0.05 / 3, 0.025, 0.025, 0.0125])


@pytest.mark.parametrize("test", room.TESTS)
def test_the_interval_and_the_adjusted_p_value_say_the_same(test):
    rng = np.random.default_rng(1)
    margin = 0.0 if test == "superiority" else 0.8
    seen = set()
    for _ in range(300):
        family = [Contrast(rng.normal(shift, 0.5, 5), test, margin) for shift in rng.uniform(-1, 1.5, 3)]
        for finding in room.judge(family):
            holds = finding.verdict == "holds"
            assert holds == (finding.p_holm < room.ERROR)
            seen.add(holds)
    assert seen == {True, False}


def test_verdicts_of_conjuncts_join():
    assert room.of_all(["holds", "holds"]) == "holds"
    assert room.of_all(["holds", "no difference"]) == "partly"
    assert room.of_all(["holds", "reversed"]) == "partly"
    assert room.of_all(["holds", "not judged"]) == "partly"
    assert room.of_all(["smaller", "undecided"]) == "partly"
    assert room.of_all(["no difference", "reversed"]) == "reversed"
    assert room.of_all(["no difference", "undecided"]) == "no difference"
    assert room.of_all(["undecided: one seed has no interval", "holds"]).startswith("undecided")


def test_false_alarms_of_a_family_stay_at_the_stated_rate():
    """Without any effect, four conjuncts on one baseline give a "holds" in at most 2.5 % of experiments, a "reversed" too."""
    rng = np.random.default_rng(2)
    holds = wrong = uncorrected = 0
    for _ in range(1500):
        baseline = rng.normal(size=5)
        family = [Contrast(rng.normal(size=5) - baseline) for _ in range(4)]
        found = room.judge(family)
        holds += any(one.verdict == "holds" for one in found)
        wrong += any(one.verdict == "reversed" for one in found)
        uncorrected += any(room.judge([one])[0].verdict == "holds" for one in family)
    assert holds / 1500 < 0.032
    assert wrong / 1500 < 0.032
    assert uncorrected / 1500 > 0.05  # what the correction is for


def test_non_inferiority_errs_at_the_stated_rate_on_its_margin():
    rng = np.random.default_rng(3)
    held = sum(
        room.judge([Contrast(rng.normal(-0.1, 0.1, 5), "non-inferiority", 0.1)])[0].verdict == "holds"
        for _ in range(4000)
    )
    assert 0.015 < held / 4000 < 0.035


def test_a_planted_effect_of_the_detectable_size_is_found_four_times_in_five():
    rng = np.random.default_rng(4)
    spread, size = 0.02, 0.0
    # The spread is known here: a sample with exactly this spread gives the size for it.
    sample = np.array([-1.0, 1.0, 0.0, -1.0, 1.0])
    size = room.detectable(sample / sample.std(ddof=1) * spread)
    found = sum(room.judge([Contrast(rng.normal(size, spread, 5))])[0].verdict == "holds" for _ in range(3000))
    assert 0.77 < found / 3000 < 0.83


def test_detectable_shrinks_with_seeds_and_grows_with_the_level():
    few, many = np.array([-1.0, 1.0, 0.0, 1.0, -1.0]), np.tile([-1.0, 1.0, 0.0, 1.0, -1.0], 4)
    assert room.detectable(many) < room.detectable(few) < room.detectable(few, 0.99)
    assert room.detectable([0.1, 0.1]) == 0.0


def test_seeds_needed_are_those_of_the_paired_t_test():
    """Differences with a mean of one standard deviation need 10 pairs, of half of it 34 (Cohen 1988; G*Power 3.1)."""
    for mean, seeds in ((1.0, 10), (0.5, 34)):
        spread = np.array([-1.0, 1.0] * 50)
        assert room.seeds_needed(mean * spread.std(ddof=1) + spread) == seeds
    assert room.seeds_needed([0.1, 0.1, 0.1]) == 2
    assert room.seeds_needed([0.0, 0.0]) is None


def test_two_sided_families_find_either_direction():
    better, worse = room.judge([Contrast([0.1, 0.11, 0.09]), Contrast([-0.1, -0.11, -0.09])], two_sided=True)
    assert (better.verdict, worse.verdict) == ("holds", "reversed")
    assert better.p == pytest.approx(worse.p)


def test_equal_values_are_constant_up_to_rounding():
    value = np.float32(-0.2636)
    assert room.constant([float(value), float(np.nextafter(value, np.float32(0)))])
    assert room.constant([0.0, 0.0])
    assert not room.constant([0.2636, 0.2637])
