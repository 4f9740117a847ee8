"""Run directories: what is one, what is in it, and what is refused."""

from __future__ import annotations

import os
import pickle
import time

import pytest
import torch

from counterpoint import training
from counterpoint.engine.run import WEIGHTS, Run, trained
from counterpoint.errors import CounterpointError, RunError


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path / "runs", {"slug": "macil-sd", "data": "x"}, "mine")
    run.save_weights({"w": torch.arange(3.0)})
    return run


def test_what_is_written_is_read_again(run):
    again = Run.open(run.path)
    assert again.config == run.config
    assert torch.equal(again.load_weights()["w"], torch.arange(3.0))
    run.write_metrics([{"epoch": 0, "a": 0.5}, {"epoch": 1, "b": 2.0}])
    assert again.metrics() == [{"epoch": 0.0, "a": 0.5}, {"epoch": 1.0, "b": 2.0}]
    assert not [p for p in run.path.iterdir() if p.name.startswith(".")]


def test_names_are_not_taken_twice(run):
    with pytest.raises(RunError, match="exists already; choose another --name, or remove this run, which is complete"):
        Run.create(run.path.parent, {"slug": "macil-sd"}, "mine")
    run.checkpoint.touch()
    with pytest.raises(RunError, match=f"or resume this run: counterpoint train --resume {run.path}"):
        Run.create(run.path.parent, {"slug": "macil-sd"}, "mine")
    first, second = (Run.create(run.path.parent, {"slug": "macil-sd"}) for _ in range(2))
    assert first.path != second.path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "is not a run directory: it has no config.yaml"),
        ("{", "not readable YAML"),
        ("- a\n- b", "does not name a system"),
        ("data: x", "does not name a system"),
        (b"\xff\xfe\x00", "not readable YAML"),
    ],
)
def test_directories_that_are_no_runs_raise_an_error(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=expected):
        Run.open(tmp_path)


def test_places_that_are_no_directories_raise_an_error(tmp_path):
    with pytest.raises(RunError, match="no such run directory"):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file, not a run directory"):
        Run.open(tmp_path / "file")
    with pytest.raises(RunError, match="cannot make the run directory"):
        Run.create(tmp_path / "file", {"slug": "macil-sd"})


def test_wrong_damaged_or_dangerous_weights_raise_an_error(run, capsys):
    from safetensors.torch import save_file

    file = run.path / WEIGHTS
    save_file({"w": torch.zeros(2)}, file, metadata={"slug": "simclr"})
    with pytest.raises(RunError, match="holds weights of 'simclr', not of 'macil-sd'"):
        run.load_weights()
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(RunError, match="not a readable safetensors file"):
        run.load_weights()

    class Evil:
        def __reduce__(self):
            return (print, ("this must not run",))

    file.write_bytes(pickle.dumps(Evil()) * 30)
    with pytest.raises(RunError, match="not a readable safetensors file"):
        run.load_weights()
    run.checkpoint.write_bytes(pickle.dumps(Evil()))
    from counterpoint.engine.checkpoint import read_checkpoint

    with pytest.raises(RunError, match="cannot be resumed from"):
        read_checkpoint(run)
    assert "must not run" not in capsys.readouterr().out


def test_trained_runs_are_listed_newest_first(run):
    root = run.path.parent
    newer = Run.create(root, {"slug": "macil-sd"}, "newer")
    newer.save_weights({"w": torch.zeros(1)})
    later = time.time() + 10
    os.utime(newer.path / WEIGHTS, (later, later))
    Run.create(root, {"slug": "macil-sd"}, "without-weights")
    other = Run.create(root, {"slug": "simclr"}, "other")
    other.save_weights({"w": torch.zeros(1)})
    (root / "stray").mkdir()
    assert trained(root)[0] == newer.path
    assert root / "without-weights" not in trained(root)
    assert other.path in trained(root.parent)
    assert trained(root / "nowhere") == []


def test_damaged_metrics_raise_an_error(run):
    with pytest.raises(RunError, match=r"no metrics\.csv"):
        run.metrics()
    (run.path / "metrics.csv").write_text("epoch,a\n0,one\n")
    with pytest.raises(RunError, match="is damaged"):
        run.metrics()


def test_unknown_settings_of_a_run_raise_an_error(run_of_clips, tmp_path):
    import shutil

    import yaml

    shutil.copytree(run_of_clips, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["config"]["flux"] = 1
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(RunError, match="macil-sd has no setting flux"):
        training.load_learner(Run.open(file.parent))
    del config["config"]["flux"], config["seed"]
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(RunError, match="it lacks seed"):
        training.load_learner(Run.open(file.parent))
    config |= {"seed": 0, "slug": "macil-ds"}
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(CounterpointError, match="did you mean macil-sd"):
        training.load_learner(Run.open(file.parent))
    config |= {"slug": "macil-sd"}
    config["config"]["hidden"] = 16
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(RunError, match="the weights do not fit its config"):
        training.load_learner(Run.open(file.parent))


def test_evaluating_again_gives_the_recorded_figures(run_of_clips, monkeypatch):
    run = Run.open(run_of_clips)
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(run_of_clips.parent.parent / "cache"))
    found = training.evaluate(run_of_clips, say=lambda _: None)
    recorded = {k.removeprefix("test/"): v for k, v in run.metrics()[-1].items() if k.startswith("test/")}
    assert found == pytest.approx(recorded, abs=1e-6)
    with pytest.raises(CounterpointError, match=r"has visual_dim .* the run was trained on"):
        training.evaluate(run_of_clips, data="async-bags?train=2&test=2")
