"""Sweeps of settings: ranges, trials, pruning, continuation, the record and the page."""

from __future__ import annotations

import json
import math
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from counterpoint import tuning
from counterpoint.cli import main
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, Interrupted
from counterpoint.experiment import Experiment
from counterpoint.files import held
from counterpoint.lab.ranges import Range
from counterpoint.systems.classics.finetune import Finetune
from counterpoint.tuning import sweep

pytest.importorskip("optuna", reason="needs the extra [sweep]")
GIVEN = {"encoder": "conv-s", "epochs": 2, "batch_size": 32, "evaluate_every": 1, "recipe": "none"}
DATA = "digits?size=8&train=128&held_out=0.05&valid=0.05"
OVER = ["lr=1e-4..1e-1:log", "tune=head,all"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr", "--over takes NAME=LOW..HIGH"),
        ("lr=3..1", "the lower number must come first"),
        ("lr=0..1:log", "above 0 with :log"),
        ("lr=1..2:square", "the only scale"),
        ("lr=a..b", "no interval of two numbers"),
        ("lr=0.1..1e999", "must be finite"),
        ("encoder=[x", "cannot be read"),
        ("batch_size=128,,256", "a choice is empty"),
    ],
)
def test_ranges_of_another_form_are_refused(text: str, said: str) -> None:
    with pytest.raises(CounterpointError, match=said):
        Range.parse(text)


def test_choices_with_an_exponent_are_numbers_and_choices_of_another_type_are_refused(tmp_path: Path) -> None:
    assert Range.parse("lr=1e-3,2E-2,conv-s").choices == (0.001, 0.02, "conv-s")
    with pytest.raises(CounterpointError, match="lr takes a number, got 'hot'"):
        sweep("finetune", DATA, ["lr=hot,0.1"], given=GIVEN, out=tmp_path / "s")


def test_a_grid_goes_from_end_to_end() -> None:
    assert Range.parse("batch-size=8..128:log").grid() == [8, 16, 32, 64, 128]
    assert Range.parse("lr=0.0..1.0").grid() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Range.parse("epochs=1..3").grid() == [1, 2, 3]
    one = Range.parse("pretrained=true,false")
    assert (one.grid(), one.shown(0)) == ([0, 1], True)


@pytest.mark.usefixtures("drawn")
def test_a_sweep_finds_the_best_trial_and_a_second_call_adds_only_what_is_missing(tmp_path: Path) -> None:
    said: list[str] = []
    first = sweep("finetune", DATA, OVER, trials=4, given=GIVEN, pruner="none", out=tmp_path / "s", say=said.append)
    assert len(first["trials"]) == 4
    best = max(first["trials"], key=lambda row: row["valid"])
    assert first["best"]["trial"] == best["trial"]
    assert first["best"]["settings"] == best["settings"]
    assert set(best["settings"]) == {"lr", "tune"}
    assert 1e-4 <= best["settings"]["lr"] <= 1e-1
    run = Run.open(first["best"]["run"])
    assert run.config["config"]["lr"] == best["settings"]["lr"]
    assert run.metrics()[-1]["valid/accuracy"] == best["valid"]
    assert [path.name for path in (tmp_path / "s" / "trials").iterdir()] == [run.path.name]  # the others are removed
    assert math.isclose(sum(first["importances"].values()), 1.0)
    page = (tmp_path / "s" / "index.html").read_text(encoding="utf-8")
    assert "Importance" in page
    assert "counterpoint train finetune" in page
    again = sweep("finetune", DATA, OVER, trials=5, given=GIVEN, pruner="none", out=tmp_path / "s", say=said.append)
    assert again["trials"][:4] == first["trials"]
    assert len(again["trials"]) == 5
    assert said[-2].startswith("1 trial of finetune")
    with pytest.raises(CounterpointError, match="a sweep with other settings"):
        sweep("finetune", DATA, ["lr=0.1..0.2"], trials=1, given=GIVEN, out=tmp_path / "s")


def test_an_interrupted_trial_is_resumed_with_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, loss = 0, Finetune.loss

    def interrupted(self: Any, batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == 13:  # in the second trial, which has eight steps
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch)

    given = {"trials": 3, "given": GIVEN, "pruner": "none", "sampler": "random", "keep": True}
    whole = sweep("finetune", DATA, OVER, out=tmp_path / "whole", **given)
    monkeypatch.setattr(Finetune, "loss", interrupted)
    with pytest.raises(Interrupted, match=r"^stopped after 1 trial; the same command or call continues$"):
        sweep("finetune", DATA, OVER, out=tmp_path / "halves", **given)
    halves = sweep("finetune", DATA, OVER, out=tmp_path / "halves", **given)
    assert count == 24  # three trials of eight steps; the step of the interruption was saved
    assert [row["settings"] for row in halves["trials"][:2]] == [row["settings"] for row in whole["trials"][:2]]
    assert [row["valid"] for row in halves["trials"][:2]] == [row["valid"] for row in whole["trials"][:2]]


def test_a_pruner_ends_trials_and_their_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optuna.trial.Trial.should_prune", lambda self: self.number == 1)
    record = sweep("finetune", DATA, OVER, trials=3, given=GIVEN, keep=True, out=tmp_path / "s")
    assert [row["state"] for row in record["trials"]] == ["complete", "pruned", "complete"]
    assert list(record["trials"][1]["reported"]) == ["0"]
    assert sorted(path.name for path in (tmp_path / "s" / "trials").iterdir()) == ["0000", "0002"]


def test_a_measure_where_less_is_better_is_minimised(tmp_path: Path) -> None:
    given = {
        "encoder": "mlp-s",
        "recipe": "digits-plain",
        "epochs": 1,
        "finetune_epochs": 1,
        "batch_size": 12,
        "projection": 8,
    }
    data = "digit-numbers?train=48&test=24&watched=16"
    record = sweep("supremix", data, ["lr=1e-4..1e-2:log"], trials=2, given=given, out=tmp_path)
    assert record["metric"] == "mae"
    assert record["best"]["valid"] == min(row["valid"] for row in record["trials"])


@pytest.mark.parametrize(
    ("name", "value", "said"), [("ring", True, "--ring"), ("pretrained", False, "--no-pretrained")]
)
def test_the_command_of_a_sweep_switches_settings_as_train_takes_them(name: str, value: bool, said: str) -> None:
    plan: Any = SimpleNamespace(given={"epochs": 2}, slug="simclr", data=DATA, seed=3)
    assert tuning.command(plan, {name: value}).endswith(f"--seed 3 --epochs 2 {said}")


def test_the_option_from_is_the_setting_start() -> None:
    assert Experiment.resolve("finetune", DATA, overrides={"from": "runs/first"}).config.start == "runs/first"


def test_diverged_trials_count_once_and_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = GIVEN | {"epochs": 1}
    with pytest.raises(CounterpointError, match="no trial was completed: the loss is nan") as raised:
        sweep("finetune", DATA, ["lr=1e36,1e37"], trials=1, given=given, out=tmp_path / "s")
    assert "replay" not in str(raised.value)  # the run is removed
    monkeypatch.setattr(Run, "metrics", lambda self, **_: [{"epoch": 0, "valid/accuracy": math.nan}])
    with pytest.raises(CounterpointError, match="no trial was completed: accuracy is nan"):
        sweep("finetune", DATA, OVER, trials=2, given=given, out=tmp_path / "t")
    assert "Traceback" not in capfd.readouterr().err


def test_what_does_not_fit_is_refused_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CounterpointError, match="finetune has no setting rate"):
        sweep("finetune", DATA, ["rate=1..2"], out=tmp_path / "s")
    with pytest.raises(CounterpointError, match="lr must be > 0"):
        sweep("finetune", DATA, ["lr=-1..2"], out=tmp_path / "s")
    with pytest.raises(CounterpointError, match="each setting once"):
        sweep("finetune", DATA, ["lr=1..2", "lr=2..3"], out=tmp_path / "s")
    unknown: dict[str, Any] = {"sampler": "best"}
    with pytest.raises(CounterpointError, match="unknown sampler 'best'"):
        sweep("finetune", DATA, OVER, out=tmp_path / "s", **unknown)
    if find_spec("cmaes") is None:
        with pytest.raises(CounterpointError, match="pip install cmaes"):
            sweep("finetune", DATA, OVER, out=tmp_path / "s", sampler="cmaes")
    epochs: list[int] = []
    monkeypatch.setattr(Finetune, "end_epoch", lambda self, epoch: epochs.append(epoch))
    with pytest.raises(CounterpointError, match=r"unknown metric 'acuracy'; did you mean accuracy\? Known: .*accuracy"):
        sweep("finetune", DATA, OVER, trials=2, given=GIVEN, metric="acuracy", out=tmp_path / "t")
    assert epochs == [0]  # the first trial ended after its first evaluation
    assert "Traceback" not in capfd.readouterr().err
    corrected = sweep("finetune", DATA, OVER, trials=1, given=GIVEN, out=tmp_path / "t")  # nothing was completed there
    assert corrected["metric"] == "accuracy"
    assert not (tmp_path / "s").exists()
    with held(tmp_path, "holds"), pytest.raises(CounterpointError, match="another process runs the sweep"):
        sweep("finetune", DATA, OVER, trials=1, given=GIVEN, out=tmp_path)


def test_the_command_prints_the_best_and_how_to_train_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "sweep",
        "finetune",
        "--data",
        DATA,
        "--over",
        "epochs=1,2",
        "--sampler",
        "grid",
        "--out",
        str(tmp_path / "s"),
    ]
    settings = [f"{name}={value}" for name, value in GIVEN.items() if name != "epochs"]
    assert main([*words, "--set", *settings, "--trials", "9"]) == 0
    out = capsys.readouterr().out
    assert "counterpoint train finetune --data" in out
    assert len(json.loads((tmp_path / "s" / "sweep.json").read_text())["trials"]) == 2  # the grid has no more
