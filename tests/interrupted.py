"""Interrupt trainings and resume them; check that they end as if they had not been interrupted."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from counterpoint import training
from counterpoint.engine.run import Run
from counterpoint.errors import Interrupted
from counterpoint.experiment import Experiment


class Whole(NamedTuple):
    """A training that was not interrupted."""

    calls: int  # of the learner's loss
    metrics: Any
    weights: dict[str, Tensor]


WHOLE: dict[str, Whole] = {}  # by system, data and settings; the cases of a test share one


def need_equal_ends(
    monkeypatch: pytest.MonkeyPatch,
    learner: type,
    slug: str,
    config: Any,
    data: str,
    at: int | Sequence[int],
    folder: Path,
) -> Run:
    """Check a training that is stopped in the call `at` of the learner's loss and resumed. Return the resumed run.

    With several calls, each resumed training is stopped in the next one.

    Metrics, weights and the number of steps must equal those of a training without interruption.

    Args:
        learner: The class whose method `loss` is counted.
        at: Number of the call, from 0; or several, in ascending order.
        folder: An existing folder for both runs.
    """
    count, loss, stop_at = 0, learner.loss, -1

    def counted(self: Any, batch: Any) -> Any:
        nonlocal count
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        count += 1
        return loss(self, batch)

    monkeypatch.setattr(learner, "loss", counted)
    given: dict[str, Any] = {"data": data, "seed": 3, "out": folder, "say": lambda _: None}
    key = f"{slug} {data} {config!r}"
    if key not in WHOLE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "_shown", lambda run, say: run)  # no page of it
            whole = training.train(slug, config, name="whole", **given)
        WHOLE[key] = Whole(count, whole.metrics(), whole.load_weights())
    wanted = WHOLE[key]
    (stop_at, *later), count = [at] if isinstance(at, int) else at, 0
    with pytest.raises(Interrupted):
        training.train(slug, config, name="halves", **given)
    for point in later:
        stop_at = point
        with pytest.raises(Interrupted):
            training.resume(folder / "halves", say=lambda _: None)
    halves = training.resume(folder / "halves", say=lambda _: None)
    assert count == wanted.calls
    assert wanted.metrics == halves.metrics()
    mine = halves.load_weights()
    for name, value in wanted.weights.items():
        assert torch.equal(value, mine[name]), name
    return halves


def cut_and_resumed(experiment: Experiment, learner: type, stop: int, folder: Path) -> Run:
    """Train with an interruption, and resume. Return the run.

    Args:
        learner: The class whose method `end_step` is counted.
        stop: Number of finished steps at which to interrupt, from 1.
        folder: The folder for the run "cut".
    """
    cut, count, before = Run.create(folder, experiment.record(0), "cut"), 0, learner.end_step

    def counted(self: Any) -> None:
        nonlocal count
        before(self)
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "end_step", counted)
        with pytest.raises(Interrupted):
            experiment.run(0, run=cut)
    training.resume(cut.path, say=lambda _: None)
    return cut
