"""Services of the loop: precision, devices, averages, early stopping, callbacks, loggers, compilation, collapse."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from counterpoint import training
from counterpoint.commands import main
from counterpoint.engine.evaluation import collapse, signs_of_collapse
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.services import Average, Callback
from counterpoint.errors import CounterpointError, Interrupted
from counterpoint.systems.classics.simclr import SimCLR
from counterpoint.tasks.online import OnlineKnn, OnlineProbe

pytestmark = pytest.mark.usefixtures("undrawn")

DATA = "digits?size=8&train=320"  # 10 steps an epoch


def config(**changes: Any) -> Any:
    base = training.default_config("simclr", "digits")
    return replace(base, encoder="mlp-s", epochs=3, batch_size=32, evaluate_every=1, **changes)


def train(folder: Any, name: str, *, loop: Loop | None = None, **more: Any) -> Run:
    return training.train(
        "simclr",
        config(),
        data=DATA,
        out=folder,
        name=name,
        loop=loop or Loop(),
        say=lambda _: None,
        bar=False,
        **more,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, undrawn: None) -> Run:
    """Train a run without options."""
    return train(tmp_path_factory.mktemp("plain"), "plain")


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C in this step, once."""
    count, loss = 0, SimCLR.loss

    def counted(self: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        nonlocal count
        if count == step:
            os.kill(os.getpid(), signal.SIGINT)
        count += 1
        return loss(self, batch)

    monkeypatch.setattr(SimCLR, "loss", counted)


def same(run: Run, other: Run) -> None:
    assert run.metrics() == other.metrics()
    mine, theirs = run.load_weights(), other.load_weights()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(
    "loop",
    [Loop(precision="bf16"), Loop(precision="16"), Loop(ema=0.9), Loop(patience=1)],
    ids=["bf16", "16", "ema", "patience"],
)
def test_a_run_with_this_option_resumes_bit_for_bit(
    plain: Run, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, loop: Loop
) -> None:
    whole = train(tmp_path, "whole", loop=loop)
    if not loop.patience:
        assert any(not torch.equal(v, plain.load_weights()[n]) for n, v in whole.load_weights().items())
    with monkeypatch.context() as patch:
        interrupted_at(patch, 13)
        with pytest.raises(Interrupted):
            train(tmp_path, "part", loop=loop)
    run = training.resume(tmp_path / "part", say=lambda _: None, bar=False)
    same(run, whole)
    assert all(v.dtype != torch.bfloat16 and v.dtype != torch.float16 for v in run.load_weights().values())


def test_evaluation_is_in_float32_whatever_the_precision(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, predict = [], SimCLR.predict

    def watched(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        found = predict(self, batch)
        seen.append((found["feature"].dtype, torch.is_autocast_enabled("cpu")))
        return found

    monkeypatch.setattr(SimCLR, "predict", watched)
    train(tmp_path, "run", loop=Loop(precision="bf16"))
    assert set(seen) == {(torch.float32, False)}


# --- what is refused, before data are read


def refused(tmp_path: Any, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = main(["train", "simclr", "--data", "digits", "--encoder", "mlp-s", "--out", str(tmp_path / "runs"), *words])
    assert code == 2
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("data were read")

    monkeypatch.setattr("counterpoint.data.load", read)


@pytest.mark.usefixtures("without_data")
def test_a_precision_that_the_gpu_lacks_is_refused(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert "--precision bf16: this GPU has no bf16" in refused(tmp_path, capsys, "--precision", "bf16")
    assert "1 CUDA devices" in refused(tmp_path, capsys, "--device", "cuda:1")


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cuda"], "--device cuda: this machine has 0 CUDA devices"),
        (["--device", "mps"], "--device mps: this machine has none"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--device", "meta"], "unknown device 'meta'"),
        (["--log", "wandb"], "--log wandb needs the package wandb"),
        (["--accumulate", "0"], "accumulate must be at least 1, got 0"),
        (["--patience", "-1"], "patience must not be negative, got -1"),
        (["--ema", "1"], "ema must be at least 0 and below 1"),
        (["--checkpoint-minutes", "-1"], "checkpoint_minutes must not be negative"),
    ],
)
def test_a_bad_option_is_refused_by_name(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert said in refused(tmp_path, capsys, *words)


@pytest.mark.usefixtures("without_data")
def test_compiling_without_a_compiler_is_refused(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "--compile needs a C++ compiler" in refused(tmp_path, capsys, "--compile", "--device", "cpu")


# --- clipping


@pytest.mark.parametrize(
    ("slug", "data", "settings"),
    [
        ("simclr", "digits", {"encoder": "mlp-s"}),
        ("macil-sd", "async-bags?train=20&test=4", {}),
        ("symile", "xor", {}),
    ],
)
def test_every_optimiser_clips_its_gradients(slug: str, data: str | None, settings: dict[str, Any]) -> None:
    from counterpoint.experiment import Experiment

    experiment = Experiment.resolve(slug, data, overrides={"clip_norm": 0.5, **settings})
    learner = experiment.learner(experiment.task().facts, 0)
    learner.epochs = learner.total_steps = learner.steps_per_epoch = 1
    optimizers = [optimizer for turn in learner.turns() for optimizer in turn.optimizers]
    assert optimizers
    for optimizer in optimizers:
        chosen = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in chosen:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        norm = torch.stack([p.grad.norm() for p in chosen if p.grad is not None]).norm()
        assert float(norm) == pytest.approx(0.5, rel=1e-3)


def test_a_norm_that_is_not_positive_is_refused(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "macil-sd", "--clip-norm", "0", "--out", str(tmp_path)]) == 2
    assert "clip_norm must be > 0" in capsys.readouterr().err


# --- averages


def test_an_average_takes_what_trains_and_copies_the_rest() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    average = Average(module, 0.5)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    average.update()  # of the first step: decay 1 / 10
    assert torch.allclose(average.values["0.weight"], start["0.weight"] + 0.9)
    assert torch.equal(average.values["1.weight"], start["1.weight"] + 1.0)
    with average.applied():
        assert torch.equal(module.state_dict()["0.weight"], average.values["0.weight"])
    assert torch.equal(module.state_dict()["0.weight"], start["0.weight"] + 1.0)


def test_exported_weights_are_the_average(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, Tensor] = {}
    update = Average.update

    def kept(self: Average) -> None:
        update(self)
        held.clear()
        held.update({name: value.clone() for name, value in self.values.items()})

    monkeypatch.setattr(Average, "update", kept)
    run = train(tmp_path, "run", loop=Loop(ema=0.9))
    for name, value in run.load_weights().items():
        assert torch.equal(value, held[name]), name


# --- early stopping


def test_early_stopping_keeps_the_best_weights_and_measures_test_once(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, weights, splits = iter([0.5, 0.7, 0.6, 0.4, 0.9]), [], []
    from counterpoint.engine import fit

    measure = fit.measure

    def measured(learner: Any, task: Any, split: str, *, final: bool) -> Any:
        splits.append(split)
        found, evaluator, signs = measure(learner, task, split, final=final)
        if split == "valid":
            weights.append({name: value.clone() for name, value in learner.state_dict().items()})
            found[task.headline] = next(values)
        return found, evaluator, signs

    monkeypatch.setattr(fit, "measure", measured)
    run = training.train(
        "simclr", replace(config(), epochs=5), data=DATA, out=tmp_path, name="run", loop=Loop(patience=2),
        say=lambda _: None, bar=False,
    )  # fmt: skip
    assert splits == ["valid"] * 4 + ["test"]
    assert len(run.metrics()) == 4
    assert run.complete
    for name, value in run.load_weights().items():
        assert torch.equal(value, weights[1][name]), name


# --- callbacks


def test_callbacks_are_called_in_order_and_add_to_the_row(tmp_path: Any) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.calls: list[str] = []

        def on_start(self, learner: Any, task: Any) -> None:
            self.calls.append("start")

        def on_step(self, learner: Any, batch: dict[str, Any], losses: Any) -> None:
            assert torch.isfinite(losses["loss"])
            assert batch["views"]
            self.calls.append("step")

        def on_epoch(self, row: dict[str, float]) -> None:
            row["mine"] = float(len(self.calls))
            self.calls.append("epoch")

        def on_end(self, rows: list[dict[str, float]]) -> None:
            assert len(rows) == 3
            self.calls.append("end")

    seen = Seen()
    run = train(tmp_path, "run", callbacks=[seen])
    steps = seen.calls.index("epoch") - 1
    assert seen.calls == ["start", *(["step"] * steps + ["epoch"]) * 3, "end"]
    assert [row["mine"] for row in run.metrics()] == [steps + 1, 2 * (steps + 1), 3 * (steps + 1)]


def test_online_measures_learn_resume_and_leave_the_learner_alone(
    plain: Run, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path, "whole", callbacks=[OnlineProbe(lr=0.01), OnlineKnn(k=5)])
    for name, value in plain.load_weights().items():
        assert torch.equal(value, whole.load_weights()[name]), name
    rows = whole.metrics()
    assert rows[-1]["probe/accuracy"] > rows[0]["probe/accuracy"] * 0.9 > 0.2
    assert all(row["knn/accuracy"] > 0.5 and 0 < row["probe/train_accuracy"] <= 1 for row in rows)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 13)
        with pytest.raises(Interrupted):
            train(tmp_path, "part", callbacks=[OnlineProbe(lr=0.01), OnlineKnn(k=5)])
    run = training.resume(
        tmp_path / "part", say=lambda _: None, bar=False, callbacks=[OnlineProbe(lr=0.01), OnlineKnn(k=5)]
    )
    same(run, whole)


# --- loggers


def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    told: list[tuple[str, Any]] = []

    class Writer:
        def log(self, figures: dict[str, float], step: int) -> None:
            told.append(("log", (step, figures)))

        def finish(self) -> None:
            told.append(("finish", None))

    module = ModuleType("wandb")
    module.init = lambda **named: (told.append(("init", named)), Writer())[1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    told: list[tuple[str, Any]] = []

    def start_run(**named: Any) -> Any:
        told.append(("start", named))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    module: Any = ModuleType("mlflow")
    module.set_experiment = lambda name: told.append(("experiment", name))
    module.start_run = start_run
    module.log_params = lambda settings: told.append(("params", settings))
    module.log_metrics = lambda figures, step: told.append(("log", (step, figures)))
    module.end_run = lambda: told.append(("end", None))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return told


def test_loggers_go_on_with_the_same_run_after_an_interruption(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = fake_wandb(monkeypatch), fake_mlflow(monkeypatch)
    loop = Loop(log=("wandb", "mlflow"))
    with monkeypatch.context() as patch:
        interrupted_at(patch, 13)
        with pytest.raises(Interrupted):
            train(tmp_path, "run", loop=loop)
    assert wandb[-1][0] == "finish"
    assert mlflow[-1][0] == "end"
    run = training.resume(tmp_path / "run", say=lambda _: None, bar=False)
    first, second = (named for kind, named in wandb if kind == "init")
    assert first["id"] == second["id"]
    assert first["config"]["encoder"] == "mlp-s"
    assert [named for kind, named in mlflow if kind == "start"] == [{"run_name": "run"}, {"run_id": "r1"}]
    assert sum(kind == "params" for kind, _ in mlflow) == 1
    steps = [int(row["step"]) for row in run.metrics()]
    for told in (wandb, mlflow):
        assert [value[0] for kind, value in told if kind == "log"] == steps
    assert "train.loss" in next(value[1] for kind, value in mlflow if kind == "log")
    assert json.loads((run.path / "loggers.json").read_text())["mlflow"] == "r1"


def test_tensorboard_has_the_figures_of_metrics_csv(tmp_path: Any) -> None:
    pytest.importorskip("tensorboardX")
    run = train(tmp_path, "run", loop=Loop(log=("tensorboard",)))
    (file,) = (run.path / "tensorboard").iterdir()
    content = file.read_bytes()
    for name in ("train/loss", "valid/", "test/"):
        assert name.encode() in content


# --- compilation


@pytest.mark.slow
def test_a_compiled_run_learns_what_another_learns(plain: Run, tmp_path: Any) -> None:
    run = train(tmp_path, "run", loop=Loop(compile=True, accumulate=1))
    assert run.metrics()[0]["train/loss"] == pytest.approx(plain.metrics()[0]["train/loss"], rel=1e-3)
    assert run.load_weights().keys() == plain.load_weights().keys()


# --- collapse


def test_signs_of_collapse_tell_spread_rows_from_equal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = signs_of_collapse([torch.randn(64, 8, generator=generator)])
    assert spread["rank"] > 7
    assert spread["uniformity"] < -2
    assert not collapse(spread)
    alike = signs_of_collapse([torch.ones(64, 8)])
    assert alike == {"rank": 1.0, "uniformity": 0.0}
    assert "collapsing" in collapse(alike)
    missing = torch.cat([torch.randn(16, 8, generator=generator), torch.zeros(48, 8)])
    assert not collapse(signs_of_collapse([missing]))


def test_a_learner_that_collapses_is_warned_about_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def collapsing(self: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss": self.encoder(batch["views"][0]).square().mean() * 100}

    said: list[str] = []
    monkeypatch.setattr(SimCLR, "loss", collapsing)
    predict = SimCLR.predict

    def alike(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        found = predict(self, batch)
        return {name: value for name, value in found.items() if name != "embedding"} | {
            "feature": torch.ones_like(found["feature"])
        }

    monkeypatch.setattr(SimCLR, "predict", alike)
    run = training.train(
        "simclr", config(), data=DATA, out=tmp_path, name="run", say=said.append, bar=False
    )  # fmt: skip
    assert sum("collapsing" in text for text in said) == 1
    assert run.metrics()[-1]["watch/rank"] == 1.0


@pytest.mark.parametrize("slug", ["simclr", "mae"])
def test_a_learner_that_does_not_collapse_is_not_warned_about(tmp_path: Any, slug: str) -> None:
    small = {"simclr": {"encoder": "mlp-s"}, "mae": {"encoder": "vit-s", "decoder_width": 24, "decoder_depth": 1}}[slug]
    settings = replace(training.default_config(slug, "digits"), epochs=1, batch_size=32, **small)
    said: list[str] = []
    run = training.train(slug, settings, data=DATA, out=tmp_path, name="run", say=said.append, bar=False)
    assert not any("collapsing" in text for text in said)
    assert run.metrics()[-1]["watch/rank"] > 1.5


def test_loggers_need_a_run_directory() -> None:
    from counterpoint.experiment import Experiment

    with pytest.raises(CounterpointError, match="--log tensorboard needs a run directory"):
        Experiment.resolve("simclr", "digits", config=config()).run(0, loop=Loop(log=("tensorboard",)))
