"""Write the page of a calibration: its threshold, the reliability of its probabilities, and recall against false alarms."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from counterpoint.report import figures
from counterpoint.report import page as parts
from counterpoint.report.page import Page
from counterpoint.tasks.calibration import Calibration


def write_calibration_report(path: Path, run: str, made: Calibration) -> Path:
    """Write one page on a calibration of a run. Return `path`."""
    facts = made.facts
    page = Page(f"Calibration of {run}", f"Made on {facts['videos']} labelled videos of {facts['data']}.")
    low, high = facts["threshold"]
    page.section(
        "Threshold",
        parts.join(
            parts.stats(
                [
                    ("threshold", f"{made.threshold:.3f}", f"95 % of resampled sets: {low:.3f} to {high:.3f}"),
                    ("recall of moments", *_told(facts["recall"], 2)),
                    ("false alarms an hour", *_told(facts["false_alarms_per_hour"], 1)),
                ]
            ),
            parts.notes(_notes(facts)),
        ),
        anchor="threshold",
    )
    curve = facts["curve"]
    rates = curve["false_alarms_per_hour"]
    first = rates.index(max(rates))  # at lower thresholds alarms join, and their number falls
    # It also falls where two alarms join in between. The curve is the best recall with at most so many alarms.
    best = sorted(zip(rates[first:], curve["recall"][first:], strict=True))
    reached = list(accumulate((recall for _, recall in best), max))
    page.section(
        "Recall against false alarms",
        parts.figures(
            parts.figure(
                figures.curves(
                    {"recall": ([rate for rate, _ in best], reached)},
                    title="Recall of moments",
                    xlabel="false alarms in an hour without violence",
                )
            ),
            parts.figure(
                figures.curves(
                    {"recall": (curve["threshold"], curve["recall"])}, title="Recall by threshold", xlabel="threshold"
                )
            ),
        ),
        anchor="recall",
    )
    drawn = {
        name: ([100 * b["probability"] for b in facts[key]["bins"]], [100 * b["share"] for b in facts[key]["bins"]])
        for name, key in (("calibrated, cross-fitted", "calibrated"), ("before", "raw"))
    }
    reliability = figures.curves(
        drawn | {"perfect": ([0.0, 100.0], [0.0, 100.0])},
        title="Violent snippets, in per cent",
        xlabel="mean probability of a bin, in per cent",
    )
    rows = [
        (name, facts[key]["brier"], facts[key]["ece"])
        for name, key in (("before", "raw"), ("calibrated", "calibrated"))
    ]
    page.section(
        "Reliability",
        parts.join(
            parts.figures(
                parts.figure(reliability, "Ten bins of equal size. On the diagonal, probabilities are true shares.")
            ),
            parts.table(
                ["scores", "Brier score", "expected calibration error"],
                rows,
                caption="Smaller is better. Each video is judged by a map that was fitted on other videos.",
            ),
        ),
        anchor="reliability",
    )
    return page.write(path)


def _told(figure: Mapping[str, float], digits: int) -> tuple[str, str]:
    low, high = figure["low"], figure["high"]
    told = f"95 %: {low:.{digits}f} to {high:.{digits}f}; left out one by one: {figure['crossed']:.{digits}f}"
    return f"{figure['value']:.{digits}f}", told


def _notes(facts: Mapping[str, Any]) -> list[str]:
    whole = (
        [f"{facts['whole']} videos count as violent throughout; write their moments into truth.csv"]
        if facts["whole"]
        else []
    )
    return [
        f"{facts['videos']} videos, {facts['positive']} with violence, {facts['moments']} moments, {facts['hours']:.2f} hours.",
        "A moment counts as found where a snippet of it lies above the threshold.",
        "A false alarm touches no true moment. Its rate is for an hour without violence.",
        *whole,
        "The intervals draw the videos again 1,000 times. 'Left out one by one': each video is judged by the threshold that the "
        "others choose.",
        "Probabilities hold for footage like these videos, with the same share of violence. In other footage they only rank.",
    ]
