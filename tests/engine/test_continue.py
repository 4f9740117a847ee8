"""A finished run is trained further; names and links stay inside their folders; equal runs make equal files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from counterpoint import cli, experiment, training
from counterpoint.core.weights import read_weights, write_weights
from counterpoint.engine.run import Run
from counterpoint.errors import RunError
from counterpoint.experiment import Experiment
from counterpoint.report.run import reproduce

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = ["--data", "digits", "--epochs", "1", "--encoder", "mlp-s", "--hidden", "16", "--batch-size", "512"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", "simclr", *SMALL, "--out", str(out), "--name", "first"]) == 0
    return Run.open(out / "first")


def test_a_run_continues_from_its_parents_weights_with_more_epochs(first: Run, monkeypatch, capsys) -> None:
    seen = {}
    start = experiment._start_from

    def watched(learner, parent):
        start(learner, parent)
        seen.update({name: value.clone() for name, value in learner.state_dict().items()})

    monkeypatch.setattr(experiment, "_start_from", watched)
    out = first.path.parent
    words = ["train", "--continue", str(first.path), "--epochs", "+2", "--out", str(out), "--name", "second"]
    assert cli.main(words) == 0
    second = Run.open(out / "second")
    assert len(second.metrics()) == second.config["config"]["epochs"] == 2
    assert second.config["config"] | {"epochs": 1} == first.config["config"]
    assert second.config["parent"] == {"run": str(first.path), "weights": first.digest()}
    for name, value in first.load_weights().items():
        torch.testing.assert_close(seen[name], value, rtol=0, atol=0)
    assert second.digest() != first.digest()
    assert reproduce(second.config).startswith(f"counterpoint train --continue {first.path}")


def test_a_run_cut_off_before_its_first_checkpoint_starts_from_its_parent(first: Run, tmp_path: Path) -> None:
    again = Run.create(tmp_path, first.config | {"parent": {"run": str(first.path), "weights": first.digest()}}, "cut")
    assert training._parent(again).path == first.path
    again.config["parent"]["weights"] = "0" * 64
    with pytest.raises(RunError, match="other weights"):
        training._parent(again)


def test_only_a_finished_run_of_the_same_system_continues(first: Run, tmp_path: Path, capsys) -> None:
    assert cli.main(["train", "byol", "--continue", str(first.path)]) == 2
    assert "is a run of simclr" in capsys.readouterr().err
    half = Run.create(tmp_path, first.config, "half")
    assert cli.main(["train", "--continue", str(half.path)]) == 2
    assert "--resume" in capsys.readouterr().err
    words = ["train", "--continue", str(first.path), "--projection", "7", "--out", str(tmp_path)]
    assert cli.main(words) == 2
    assert "do not fit" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "a/b", "/somewhere/x", "..", "."])
def test_names_with_a_path_are_refused(tmp_path: Path, name: str, capsys) -> None:
    out = tmp_path / "runs"
    assert cli.main(["train", "simclr", "--data", "digits", "--out", str(out), "--name", name]) == 2
    assert "--out" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_links_out_of_a_run_are_refused_and_links_to_a_run_are_not(first: Run, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(first.path)
    assert Run.open(tmp_path / "linked").slug == "simclr"
    run = Run.create(tmp_path, first.config, "own")
    (run.path / "model.safetensors").symlink_to(first.path / "model.safetensors")
    with pytest.raises(RunError, match=r"model\.safetensors is a link to a file outside"):
        Run.open(run.path)


def test_load_learner_takes_a_path(first: Run) -> None:
    found = training.load_learner(str(first.path)).state_dict()
    for name, value in training.load_learner(first).state_dict().items():
        assert torch.equal(value, found[name])


def test_equal_weights_make_equal_files(tmp_path: Path) -> None:
    state = {f"layer{n}.weight": torch.full((3, n + 1), float(n)) for n in range(5)}
    for n in range(8):
        write_weights(tmp_path / f"{n}.safetensors", state, "simclr")
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    back = read_weights(tmp_path / "0.safetensors", "simclr")
    assert all(torch.equal(back[name], value) for name, value in state.items())
    with pytest.raises(RunError, match="holds weights of"):
        read_weights(tmp_path / "0.safetensors", "byol")


def test_settings_are_checked_before_data_are_read(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Experiment, "source", lambda *a, **k: pytest.fail("read"))
    for option, value, said in (
        ("--encoder", "resnet-z", "did you mean resnet-s"),
        ("--encoder", "timm:resnet1", "did you mean resnet18"),
        ("--recipe", "simclrr", "did you mean simclr"),
        ("--batch-size", "1", "batch_size must be at least 2"),
    ):
        assert cli.main(["train", "simclr", "--data", "digits", "--out", str(tmp_path), option, value]) == 2
        assert said in capsys.readouterr().err, option
    for option in ("--text-encoder", "--audio-encoder", "--image-encoder"):
        assert cli.main(["train", "clip", "--data", "glyphs", "--out", str(tmp_path), option, "nothing"]) == 2
        assert "encoder 'nothing'" in capsys.readouterr().err


def test_chance_stands_beside_what_was_measured(first: Run, capsys) -> None:
    assert first.chance() == {"knn_accuracy": 0.1, "linear_accuracy": 0.1}
    assert cli.main(["evaluate", str(first.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chance"] == first.chance()
    assert cli.main(["evaluate", str(first.path)]) == 0
    assert "chance 0.1000" in capsys.readouterr().out
    page = (first.path / "report.html").read_text()
    assert "chance" in page
    # One epoch was measured: nothing is a mean or a best.
    assert "mean of" not in page
    assert "best" not in page.partition('id="settings"')[0].partition('id="outcome"')[2].partition("</section>")[0]


def test_resume_and_continue_exclude_each_other(first: Run, capsys) -> None:
    run = str(first.path)
    assert cli.main(["train", "--continue", run, "--resume", run]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_help_lists_every_recipe_and_own_encoder(capsys) -> None:
    from counterpoint.encoders.images import OWN
    from counterpoint.views.images import RECIPES

    for slug, encoder in (("simclr", "--encoder"), ("supcon", "--encoder"), ("clip", "--image-encoder")):
        with pytest.raises(SystemExit):
            cli.main(["train", slug, "--help"])
        said = capsys.readouterr().out
        assert encoder in said
        words = set(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", said))
        assert set(RECIPES) <= words, (slug, set(RECIPES) - words)
        assert set(OWN) <= words, (slug, set(OWN) - words)
