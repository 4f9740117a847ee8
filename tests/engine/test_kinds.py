"""Test that every kind of learner, killed inside each stage and at its boundaries, ends as an uninterrupted one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from toy import never_otherwise

from counterpoint.engine.fit import fit
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.services import Callback
from counterpoint.experiment import Experiment
from launch import exit_code

DIGITS = "digits?size=16&train=40&held_out=0.02"
SMALL = {"encoder": "conv-s", "batch_size": 10, "evaluate_every": 1, "bank": 40, "warmup_epochs": 0}
VIEWS = SMALL | {"hidden": 8, "projection": 8, "epochs": 2}
TAUGHT = SMALL | {"teacher_encoder": "conv-s", "teacher_epochs": 2, "epochs": 2}
ALBEF = {
    "epochs": 2, "batch_size": 4, "queue": 8, "image_encoder": "vit-s", "text_encoder": "text-s", "pretrained": False,
    "embedding": 6, "context": 8, "vocabulary": 300, "recipe": "weak", "depth": 2, "width": 16, "heads": 2,
    "fusion_layers": 1, "dropout": 0.1, "rerank": 4, "evaluate_every": 2,
}  # fmt: skip

KINDS = {
    "macil-sd": (
        "async-bags?train=10&test=3",
        {"epochs": 2, "batch_size": 4, "contrast_delay": 0, "contrast_step": 0.2, "cosine_epochs": 2},
    ),
    "crd": (DIGITS, TAUGHT | {"negatives": 8}),
    "mcl": (DIGITS, VIEWS | {"mcl.stages": 1, "mcl.clusters": 2}),
    "moco-v2+mcl": (DIGITS, VIEWS | {"queue": 20, "mcl.stages": 1, "mcl.clusters": 2}),
    "moco-v2+isogclr": (DIGITS, VIEWS | {"queue": 20}),
    "byol": (DIGITS, VIEWS | {"schedule": "step"}),
    "mean-teacher": (DIGITS, SMALL | {"epochs": 2, "labels_per_class": 2, "labelled_batch": 4}),
    "albef": ("digit-captions?train=14&valid=0.02", ALBEF),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(slug, **more):
    spec, settings = KINDS[slug]
    experiment = Experiment.resolve(slug, spec, overrides=settings | more)
    source = experiment.source()

    def make():
        task = experiment.task(source)
        return experiment.learner(task.facts, 3), task

    return make


def points(make):
    """List five points of a fit at which to kill it.

    The first half has three: at once, inside, and at its end before saving. The others are the start of the second half and
    the last step.
    """
    learner, task = make()
    steps = len(task.train_loader(0, learner.position))
    stages = learner.stages()
    epochs = sum(stage.epochs for stage in stages)
    half = stages[0].epochs if len(stages) > 1 else epochs // 2
    assert steps > 1
    return [
        {"step": 0},
        {"step": 1},
        {"epoch": half - 1},
        {"step": half * steps},
        {"step": epochs * steps - 1},
        {"epoch": epochs - 1},
    ]


@pytest.mark.parametrize(
    "slug", [pytest.param(slug, marks=pytest.mark.slow if slug == "albef" else ()) for slug in KINDS]
)
def test_killed_at_five_points_it_ends_the_same(slug, tmp_path):
    make = made(slug)
    never_otherwise(make, tmp_path, points(make))


def test_a_student_of_a_run_resumes_exactly(tmp_path):
    from counterpoint.training import train

    settings = KINDS["crd"][1] | {"epochs": 1, "teacher_epochs": 1}
    config = Experiment.resolve("crd", DIGITS, overrides=settings).config
    run = train("crd", config, data=DIGITS, out=tmp_path, name="teacher", say=lambda _: None)
    make = made("crd", teacher=str(run.path))
    never_otherwise(make, tmp_path, points(make))


class KillProcess(Callback):
    """Kills the process from within in step `at`, as hard as `kill -9` does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, learner, batch, losses):
        if learner.position.all_steps == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def child(folder: Path, at: int) -> None:
    """Train, or resume what is there."""
    run = Run.open(folder) if folder.exists() else Run.create(folder.parent, {"slug": "simclr"}, folder.name)
    learner, task = made("moco-v2+mcl")()
    fit(learner, task, run=run, loop=Loop(checkpoint_minutes=0), bar=False, callbacks=[KillProcess(at)])


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(tmp_path):
    assert exit_code(child, tmp_path / "whole", -1) == 0
    assert exit_code(child, tmp_path / "broken", 9) == -signal.SIGKILL  # in the second stage
    assert exit_code(child, tmp_path / "broken", -1) == 0
    whole, broken = Run.open(tmp_path / "whole"), Run.open(tmp_path / "broken")
    assert whole.metrics() == broken.metrics()
    theirs = whole.load_weights()
    for name, value in broken.load_weights().items():
        assert torch.equal(value, theirs[name]), name
