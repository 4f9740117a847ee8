"""Data sources compute where `--device` says, and give the same features there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from counterpoint import data, training
from counterpoint.data.devices import chosen_device, computing_on
from counterpoint.data.media import write_video
from counterpoint.encoders.on_device import beside
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.errors import DataError
from counterpoint.use.calibrate import calibrate
from pretend_gpu import pretend_gpu

GPU = torch.device("cuda", 0)


class Eye:
    """A visual backbone with a network of one layer."""

    name, dim, frames_per_snippet, frame_size = "one layer", 8, 2, (6, 4)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(2 * 4 * 6 * 3, 8)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    @torch.inference_mode()
    def __call__(self, frames: Any) -> Any:
        found = self.model(beside(self.model, frames).flatten(1).float() / 255)
        return found.cpu().numpy()


@pytest.fixture
def folders(tmp_path):
    for split in ("train", "test"):
        for label, colour in (("violent", (200, 30, 30)), ("normal", (30, 30, 200))):
            frames = (np.full((48, 64, 3), colour, np.uint8) for _ in range(48))
            write_video(tmp_path / "mine" / split / label / "a.mp4", frames, None)
    return tmp_path / "mine"


def test_videos_have_the_features_of_the_processor(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("counterpoint.encoders.build_visual", lambda spec: Eye())
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "here"))
    here = data.load(f"videos:{folders}").train
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "there"))
    with pretend_gpu(monkeypatch), computing_on(GPU):  # it fails where nothing is computed on the GPU
        there = data.load(f"videos:{folders}").train
    for one, other in zip(here, there, strict=True):
        np.testing.assert_allclose(one.visual, other.visual, rtol=1e-6)
        np.testing.assert_array_equal(one.audio, other.audio)


def test_the_chosen_device_ends_with_its_block(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with computing_on(GPU):
        with computing_on(torch.device("cpu")):
            assert chosen_device().type == "cpu"
        assert chosen_device() == GPU
    assert chosen_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device().type == "cuda"


@pytest.mark.parametrize("command", ["train", "evaluate", "calibrate"])
def test_a_command_names_its_device(command, run_of_clips, tmp_path, monkeypatch):
    seen = []

    def load(*args: Any, **options: Any) -> Any:
        seen.append(chosen_device())
        raise DataError("enough")

    monkeypatch.setattr("counterpoint.data.load", load)
    monkeypatch.setattr(Loop, "on", lambda self: torch.device("cpu", 0))  # not what a source would choose itself
    start = {
        "train": lambda: training.train("macil-sd", data="arcade", out=tmp_path, say=lambda _: None),
        "evaluate": lambda: training.evaluate(run_of_clips),
        "calibrate": lambda: calibrate(Run.open(run_of_clips), "arcade"),
    }
    with pytest.raises(DataError, match="enough"):
        start[command]()
    assert seen == [torch.device("cpu", 0)]


def test_what_a_system_changes_is_computed_there_too(monkeypatch):
    from counterpoint.experiment import Experiment

    experiment = Experiment.resolve("macil-sd", "arcade")
    places = []

    def task(self: Any, source: Any = None) -> Any:
        places.append(chosen_device())
        raise DataError("enough")

    monkeypatch.setattr(Experiment, "task", task)
    monkeypatch.setattr(Loop, "on", lambda self: torch.device("cpu", 0))
    with pytest.raises(DataError, match="enough"):
        experiment.run(0, source=object())
    assert places == [torch.device("cpu", 0)]
