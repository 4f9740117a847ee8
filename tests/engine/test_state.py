"""A run's folder names the process that trains it, and how a training ended that did not reach its end."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest

from counterpoint import training
from counterpoint.engine.run import STATE, Run
from counterpoint.engine.state import State, born, machine, read_state, recorded
from counterpoint.errors import Diverged, Interrupted, RunError
from counterpoint.systems.alignment.macil_sd import MacilSD
from launch import exit_code

pytestmark = pytest.mark.usefixtures("undrawn")
LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux's /proc")
DATA = "async-bags?train=20&test=4"


def train(tmp_path, monkeypatch, loss):
    config = replace(training.default_config("macil-sd", "async-bags"), epochs=1, batch_size=10)
    with monkeypatch.context() as patch:
        patch.setattr(MacilSD, "loss", loss)
        return training.train("macil-sd", config, data=DATA, out=tmp_path, name="run", say=lambda _: None, bar=False)


def child(folder):
    """End this process hard while it trains."""
    with recorded(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_finished_run_has_no_record_and_one_that_trains_has(tmp_path, monkeypatch):
    seen, before = [], MacilSD.loss

    def watched(self, batch):
        seen.append(read_state(tmp_path / "run"))
        return before(self, batch)

    run = train(tmp_path, monkeypatch, watched)
    assert (seen[0].state, seen[0].pid) == ("training", os.getpid())
    assert not (run.path / STATE).exists()
    assert run.state is None


@pytest.mark.parametrize(
    ("error", "kind", "state", "said"),
    [
        ("nan", Diverged, "diverged", "training diverged .*; train again with a lower --lr"),
        ("interrupt", Interrupted, "interrupted", "its training was interrupted; finish it first"),
        ("crash", ZeroDivisionError, "failed", "its training failed .ZeroDivisionError: one by zero.; finish it first"),
    ],
)
def test_a_training_that_ended_early_is_recorded_as_it_ended(tmp_path, monkeypatch, error, kind, state, said):
    before = MacilSD.loss

    def broken(self, batch):
        found = before(self, batch)
        if error == "crash":
            raise ZeroDivisionError("one by zero")
        if error == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return {name: value * float("nan") if error == "nan" else value for name, value in found.items()}

    with pytest.raises(kind):
        train(tmp_path, monkeypatch, broken)
    found = read_state(tmp_path / "run")
    assert found is not None
    assert (found.state, found.alive) == (state, False)
    with pytest.raises(RunError, match=f"run is not finished: .*{said}"):
        Run.finished(tmp_path / "run")


@LINUX
def test_a_killed_process_is_known_and_a_live_one_keeps_its_run(tmp_path):
    run = Run.create(tmp_path, {"slug": "macil-sd", "data": DATA, "seed": 0}, "run")
    assert exit_code(child, run.path) == -signal.SIGKILL
    found = run.state
    assert found is not None
    assert (found.state, found.alive) == ("training", False)
    with pytest.raises(RunError, match="the process of its training was ended; finish it first"):
        run.need_complete()
    # Another process that is alive: this one's parent.
    live = State("training", "", machine(), os.getppid(), born(os.getppid()))
    (run.path / STATE).write_text(json.dumps(vars(live)))
    with pytest.raises(RunError, match=f"process {os.getppid()} is training .*run; wait for its end"):
        training.resume(run.path)
    with pytest.raises(RunError, match=f"process {os.getppid()} trains it; wait for its end"):
        run.need_complete()
    assert replace(live, machine="elsewhere").alive is None
    assert replace(live, born="1").alive is False  # another process took its number


@pytest.mark.parametrize(
    "text", ["", "[", "[]", '{"state": 3}', '{"state": "asleep"}', '{"state": "training", "x": 1}']
)
def test_a_damaged_record_is_no_record(tmp_path, text):
    (tmp_path / STATE).write_text(text)
    assert read_state(tmp_path) is None
