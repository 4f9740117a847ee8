"""Write the page of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from counterpoint.files import quoted
from counterpoint.report import figures
from counterpoint.report import page as parts
from counterpoint.report.detection import detection_sections
from counterpoint.report.page import Page, number
from counterpoint.report.run import columns, epochs, group, last_mean, values
from counterpoint.tasks.moments import Detection

WHAT = (
    "Game clips were rendered from real sprites and sound effects: explosions, hits, hurts and lasers are violent, "
    "coins, jumps, upgrades and music are not, and the sound often comes late or from off-screen. "
    "Two models learned from one label per clip, violent or not, without times: plain multiple-instance learning (MIL), "
    "and MACIL-SD, which adds contrast between sound and image, and self-distillation. "
    "Then each model scored video files (.mp4) that it had not seen, and the moments with high scores were marked."
)


def write_demo_report(
    path: Path,
    *,
    results: Sequence[Mapping[str, Any]],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    detections: Sequence[Detection],
    environment: Mapping[str, Any],
    failures: Sequence[tuple[Path, str]] = (),
) -> Path:
    """Write the demo's page and return its path.

    Args:
        path: The page to write.
        results: One mapping for each trained run: `arm`, `seed` and metrics (`av_ap`, ...). The first arm is the baseline.
        histories: Maps `ARM, seed N` to the run's rows of metrics.csv. The curves of an arm share a colour.
        detections: The detections in the held-out videos.
        environment: Versions and machine.
        failures: (file, reason) of videos that could not be read.
    """
    path = Path(path)
    page = Page("Violent moments, found from video-level labels", "Counterpoint's demo: MACIL-SD beside plain MIL")
    page.section("What was done", parts.text(WHAT), anchor="what")
    page.section("Average precision", _results(results), anchor="results")
    detection_sections(page, detections, folder=path.parent, failures=failures)
    page.section("Training", _histories(histories), anchor="training")
    page.section("What to run next", _next(detections), anchor="next")
    page.section("Environment", parts.pairs(environment), anchor="environment")
    return page.write(path)


def _results(results: Sequence[Mapping[str, Any]]) -> Markup:
    metrics = list(dict.fromkeys(k for row in results for k in row if k not in ("arm", "seed")))
    arms = list(dict.fromkeys(str(row["arm"]) for row in results))
    if not metrics:
        return parts.text("No run was measured.")

    def mean(arm: str, metric: str) -> float:
        return last_mean(np.array([_value(row, metric) for row in results if row["arm"] == arm], float), len(results))

    first = metrics[0]
    cards = [(arm, number(mean(arm, first)), f"{first}, mean over seeds") for arm in arms]
    if len(arms) > 1:
        gain = mean(arms[-1], first) - mean(arms[0], first)
        cards.append(("difference", number(gain, sign=True), f"{arms[-1]} − {arms[0]}"))
    rows: list[list[Any]] = []
    for arm in arms:
        own = [row for row in results if row["arm"] == arm]
        rows += [[arm, f"seed {row['seed']}", *(_value(row, m) for m in metrics)] for row in own]
        if len(own) > 1:
            rows.append([Markup("<strong>{}</strong>").format(arm), "mean", *(mean(arm, m) for m in metrics)])
    return parts.join(
        parts.stats(cards),
        parts.table(["arm", "", *metrics], rows),
        parts.text(
            "Average precision per frame of the test clips: the area under the precision-recall curve. Its maximum is 1; "
            "at chance level it is the share of violent frames. A few seeds on a small set are weak evidence of an effect; "
            "counterpoint verify macil-sd measures it with an interval."
        ),
    )


def _value(row: Mapping[str, Any], metric: str) -> float:
    value = row.get(metric)
    return float("nan") if value is None else float(value)


def _histories(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Markup:
    names = list(dict.fromkeys(name for rows in histories.values() for name in columns(rows)))
    wanted = [n for n in names if group(n) == "test"] + [n for n in names if n in ("train/mil", "train/loss")]
    families = {label: label.partition(",")[0] for label in histories}
    pictures = []
    for name in wanted:
        series = {
            label: (epochs(rows), values(rows, name))
            for label, rows in histories.items()
            if rows and np.isfinite(values(rows, name)).any()
        }
        # A curve of one value would be a dot; the table of results has it.
        if any(np.isfinite(y).sum() > 1 for _, y in series.values()):
            pictures.append(parts.figure(figures.curves(series, title=name, xlabel="epoch", families=families)))
    return parts.figures(*pictures) if pictures else parts.text("No curve was recorded.")


def _next(detections: Sequence[Detection]) -> Markup:
    run = quoted(detections[0].run) if detections else "RUN"
    return parts.join(
        parts.text("Detect moments in your own video (a model of game clips is not accurate on other videos):"),
        parts.command(f"counterpoint detect VIDEO.mp4 --run {run}"),
        parts.text("Train on your own videos, sorted into train/ and test/, violent/ and normal/:"),
        parts.command("counterpoint train macil-sd --data videos:DIR"),
        parts.text("Test the paper's claim with five seeds and an interval:"),
        parts.command("counterpoint verify macil-sd"),
        parts.text("See what else there is:"),
        parts.command("counterpoint systems"),
    )
