"""Runs that are stopped, in whatever way and at whatever step, end with the figures they would have had."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch

from counterpoint import training
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.errors import Interrupted, RunError
from counterpoint.systems.alignment.macil_sd import MacilSD
from launch import exit_code

pytestmark = pytest.mark.usefixtures("undrawn")

DATA = "async-bags?train=40&test=10"
STEPS = 3 * 5  # epochs x batches


def config():
    base = training.default_config("macil-sd", "async-bags")
    # Five batches an epoch, the last a small one; both optimisers, schedulers, the contrast and dropout at work.
    return replace(base, epochs=3, batch_size=9, contrast_delay=0, contrast_step=0.2, cosine_epochs=3)


def child(folder, kill_at, minutes):
    """Train or resume, and kill the process from within at a given step: as hard as `kill -9` does."""
    count, loss = 0, MacilSD.loss

    def counted(self, batch):
        nonlocal count
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return loss(self, batch)

    MacilSD.loss = counted
    loop = Loop(checkpoint_minutes=minutes)
    if folder.exists():
        training.resume(folder, loop=loop)
    else:
        training.train("macil-sd", config(), data=DATA, seed=5, out=folder.parent, name=folder.name, loop=loop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert exit_code(child, folder, -1, 10.0) == 0
    return Run.open(folder)


def same(run, other):
    assert run.complete
    assert run.metrics() == other.metrics()
    assert len(run.metrics()) == 3
    mine, theirs = run.load_weights(), other.load_weights()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.slow
def test_killed_at_several_steps_and_resumed_it_ends_the_same(whole, tmp_path):
    folder = tmp_path / "run"
    # In the first epoch, before anything was saved; then two steps into the second; then at its last step.
    for kill_at, minutes in ((3, 10.0), (7, 0.0), (2, 0.0)):
        assert exit_code(child, folder, kill_at, minutes) == -signal.SIGKILL
        assert not Run.open(folder).complete
        with pytest.raises(RunError, match=r"counterpoint train --resume|train it first"):
            Run.open(folder).load_weights()
    assert exit_code(child, folder, -1, 10.0) == 0
    same(Run.open(folder), whole)
    assert (folder / "report.html").is_file()
    with pytest.raises(RunError, match="is complete"):
        training.resume(folder)


@pytest.mark.parametrize("at", [0, 4, 8, STEPS - 1])
def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path, monkeypatch, at):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    count, loss = 0, MacilSD.loss

    def interrupted(self, batch):
        nonlocal count
        if count == at:
            os.kill(os.getpid(), signal.SIGINT)
        count += 1
        return loss(self, batch)

    monkeypatch.setattr(MacilSD, "loss", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"counterpoint train --resume {tmp_path / 'run'}"):
        training.train("macil-sd", config(), data=DATA, seed=5, out=tmp_path, name="run", say=lambda _: None)
    assert signal.getsignal(signal.SIGINT) is handler
    assert count == at + 1  # the step in hand was ended, no other begun
    training.resume(tmp_path / "run", say=lambda _: None)
    assert count == STEPS  # no step was done twice
    same(Run.open(tmp_path / "run"), whole)
    torch.set_num_threads(threads)


def test_a_damaged_checkpoint_is_named_and_left_alone(tmp_path, monkeypatch):
    def interrupted(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch)

    loss = MacilSD.loss
    monkeypatch.setattr(MacilSD, "loss", interrupted)
    with pytest.raises(Interrupted):
        training.train("macil-sd", config(), data=DATA, out=tmp_path, name="run", say=lambda _: None)
    checkpoint = tmp_path / "run" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"last\.ckpt cannot be resumed from .*; delete it"):
        training.resume(tmp_path / "run", say=lambda _: None)
    assert checkpoint.stat().st_size == 1000
