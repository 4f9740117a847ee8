"""A batch whose loss is not finite is kept, and `counterpoint replay` shows where numbers stopped being finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from counterpoint import training
from counterpoint.commands import main
from counterpoint.engine.kept import read_batch
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, RunError
from counterpoint.systems.alignment.macil_sd import MacilSD
from counterpoint.systems.classics.simclr import SimCLR


def diverged(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a run whose third step met weights that are not finite."""
    loss = SimCLR.loss

    def broken(self: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.position.step == 2:
            with torch.no_grad():
                self.projector[0].weight[0, 0] = float("nan")
        return loss(self, batch)

    settings = replace(training.default_config("simclr", "digits"), encoder="mlp-s", epochs=1, batch_size=128)
    with monkeypatch.context() as patch:
        patch.setattr(SimCLR, "loss", broken)
        with pytest.raises(CounterpointError, match=r"the loss is nan at step 2(.|\n)*counterpoint replay"):
            training.train("simclr", settings, data="digits", out=tmp_path, name="run", say=lambda _: None, bar=False)
    return Run.open(tmp_path / "run")


def test_the_batch_is_kept_and_replayed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = diverged(tmp_path, monkeypatch)
    kept = read_batch(run)
    assert kept["position"]["step"] == 2
    assert len(kept["batch"]["image"]) == 128
    found = training.replay(run.path)
    assert found.step == 2
    # The layer after it has taken them into its running statistics.
    assert found.weights == ["projector.0.weight", "projector.1.running_mean", "projector.1.running_var"]
    assert found.modules[0] == "projector.0 (Linear)"
    assert found.losses["loss"] != found.losses["loss"]
    assert not found.finite
    assert found.statistics["image"]["shape"] == (128, *kept["batch"]["image"].shape[1:])
    assert found.statistics["views.0"]["not_finite"] == 0
    assert main(["replay", str(run.path)]) == 0
    said = capsys.readouterr().out
    for text in ("epoch 1, step 2", "projector.0 (Linear)", "projector.0.weight", "views.0", "nan"):
        assert text in said


def test_a_turn_and_a_later_step_are_replayed_with_their_random_numbers(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    visual_loss = MacilSD.visual_loss

    def broken(self: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        found = visual_loss(self, batch)
        if self.position.step == 1:
            losses.append(float(found["visual_loss"]))
            return {"visual_loss": found["visual_loss"] * float("nan")}
        return found

    settings = replace(training.default_config("macil-sd", "async-bags"), epochs=1, batch_size=9)
    with monkeypatch.context() as patch:
        patch.setattr(MacilSD, "visual_loss", broken)
        with pytest.raises(CounterpointError, match="counterpoint replay"):
            training.train(
                "macil-sd", settings, data="async-bags?train=20&test=4", out=tmp_path, name="run", say=lambda _: None
            )
    found = training.replay(tmp_path / "run")
    assert (found.step, found.turn) == (1, 1)
    assert found.losses == {"visual_loss": losses[0]}  # dropout included
    assert found.finite


def test_runs_without_a_kept_batch_or_with_a_damaged_one_are_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = diverged(tmp_path, monkeypatch)
    file = run.path / "bad-batch.ckpt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match=r"bad-batch\.ckpt cannot be read"):
        training.replay(run.path)
    file.unlink()
    assert main(["replay", str(run.path)]) == 2
    assert "keeps no batch" in capsys.readouterr().err
