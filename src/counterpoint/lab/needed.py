"""End a run early that cannot be judged, because it is never measured by the metric that was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from counterpoint.engine.evaluation import measure
from counterpoint.engine.learner import Learner
from counterpoint.engine.services import Callback
from counterpoint.errors import CounterpointError, unknown


class NeedMetric(Callback):
    """End a run after the first measured epoch of its last stage when its figures lack a metric.

    Args:
        metric: The metric, as `lab.runner.figures` names it.
    """

    def __init__(self, metric: str) -> None:
        self.metric, self.seen = metric, False

    def on_start(self, learner: Learner, task: Any) -> None:
        self.learner, self.task, self.stages = learner, task, len(learner.stages())

    def on_epoch(self, row: dict[str, float]) -> None:
        valid = {name.removeprefix("valid/") for name in row if name.startswith("valid/")}
        if self.seen or not valid or self.learner.position.stage + 1 < self.stages:
            return
        self.seen = True
        known = (
            valid | {"seconds"} | {name.replace("/", "_", 1) for name in row if name.startswith(("valid/", "train/"))}
        )
        if self.metric not in known:  # some metrics are computed once, and some on test alone
            known |= measure(self.learner, self.task, "test", final=True)[0].keys()
        if self.metric not in known:
            raise lacking(self.metric, sorted(known))


def lacking(metric: str, known: Iterable[str]) -> CounterpointError:
    """Return the error for a metric that a run lacks: near names, and all names that it has."""
    names = list(known)
    said = str(unknown("metric", metric, names))
    return CounterpointError(said if "known:" in said else f"{said} Known: {', '.join(names)}")
