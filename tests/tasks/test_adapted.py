"""`--lora`: adapters train, the base stays bit for bit; heads, momentum teachers, resuming, export, teachers, errors."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import counterpoint as cp
from counterpoint import cli, training
from counterpoint.encoders import adapters
from counterpoint.encoders.images import build_image_encoder
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, Interrupted
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.classics.supcon import SupCon

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra [adapters]")

DATA = "digits?size=16&train=64&held_out=0.05&valid=0.05"
SMALL: dict[str, Any] = {
    "epochs": 2, "batch_size": 32, "recipe": "none", "evaluate_every": 9, "bank": 64, "warmup_epochs": 0, "lr": 0.5,
}  # fmt: skip
PROJECTED = SMALL | {"hidden": 16, "projection": 8}


def trained(slug: str, out: Path, name: str, **settings: Any) -> Run:
    small = PROJECTED if slug in ("simclr", "supcon") else SMALL
    config = Experiment.resolve(slug, DATA, overrides=small | settings).config
    return training.train(slug, config, data=DATA, out=out, name=name, say=lambda _: None)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Train short runs of three encoders, and save a folder with a vision transformer of transformers."""
    from transformers import ViTConfig, ViTModel

    out = tmp_path_factory.mktemp("parents")
    encoders = ("vit-s", "resnet-cifar:1-1-1", "timm:test_resnet")
    found = {
        name: str(trained("simclr", out, f"run{n}", encoder=name, epochs=1).path) for n, name in enumerate(encoders)
    }
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(out / "vit")
    return found | {"hf": str(out / "vit")}


def start_of(name: str, parents: Mapping[str, str]) -> dict[str, Any]:
    return {"encoder": f"hf:{parents['hf']}", "pretrained": True} if name == "hf" else {"start": f"run:{parents[name]}"}


def base_of(name: str, parents: Mapping[str, str]) -> torch.nn.Module:
    if name == "hf":
        return build_image_encoder(f"hf:{parents['hf']}", 16, pretrained=True).eval()
    return load_learner(parents[name]).encoder


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ["vit-s", "resnet-cifar:1-1-1", "timm:test_resnet", "hf"])
def test_training_leaves_the_base_and_its_statistics_bit_for_bit(
    name: str, parents: Mapping[str, str], tmp_path: Path, undrawn: None
) -> None:
    run = trained("supcon", tmp_path, "lora", lora=2, **start_of(name, parents))
    learner: Any = cp.load(run.path).learner
    base, x = base_of(name, parents), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert equal(adapters.base_state(learner.encoder), base.state_dict())
    moved = [p for n, p in adapters.adapter_parameters(learner.encoder).items() if "lora_B" in n]
    assert moved
    assert all(bool(p.any()) for p in moved)
    with torch.no_grad():
        before, after = base(x), learner.encoder(x)
        assert not torch.allclose(before, after)
        with adapters.adapters_off(learner.encoder):
            assert torch.equal(learner.encoder(x), before)


def test_statistics_move_where_they_are_asked_to(parents: Mapping[str, str], tmp_path: Path, undrawn: None) -> None:
    start = start_of("resnet-cifar:1-1-1", parents)
    run = trained("supcon", tmp_path, "lora", lora=2, lora_statistics="train", **start)
    base = base_of("resnet-cifar:1-1-1", parents).state_dict()
    after = adapters.base_state(load_learner(run).encoder)
    changed = {key.rpartition(".")[2] for key, value in after.items() if not torch.equal(value, base[key])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_a_new_head_trains_beside_the_frozen_base(parents: Mapping[str, str]) -> None:
    start = start_of("resnet-cifar:1-1-1", parents)
    settings = SMALL | start | {"lora": 2, "teacher_encoder": "conv-s", "teacher_epochs": 1, "epochs": 1}
    experiment = Experiment.resolve("kd", DATA, overrides=settings)
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    first = {name: value.clone() for name, value in learner.state_dict().items()}
    from counterpoint.engine.fit import fit

    fit(learner, task, bar=False)
    assert not torch.equal(learner.classifier.weight, first["classifier.weight"])
    assert not torch.equal(learner.teacher.classifier.weight, first["teacher.classifier.weight"])
    base = base_of("resnet-cifar:1-1-1", parents)
    assert equal(adapters.base_state(learner.encoder), base.state_dict())


def test_a_momentum_teacher_starts_with_the_run_too(parents: Mapping[str, str]) -> None:
    experiment = Experiment.resolve("byol", DATA, overrides=PROJECTED | start_of("vit-s", parents) | {"epochs": 1})
    base = base_of("vit-s", parents)
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    learner.take_start()
    assert equal(learner.encoder.state_dict(), base.state_dict())
    copies = [m for m in learner.modules() if type(m) is type(base) and m is not learner.encoder]
    assert len(copies) == 1
    assert equal(copies[0].state_dict(), base.state_dict())


def test_interrupted_and_resumed_it_ends_the_same(
    parents: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    count, loss, stop_at = 0, SupCon.loss, -1

    def counted(self: Any, batch: Any) -> Any:
        nonlocal count
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        count += 1
        return loss(self, batch)

    monkeypatch.setattr(SupCon, "loss", counted)
    settings: dict[str, Any] = start_of("timm:test_resnet", parents) | {"lora": 2}
    whole = trained("supcon", tmp_path, "whole", **settings)
    count, stop_at = 0, 3
    with pytest.raises(Interrupted):
        trained("supcon", tmp_path, "halves", **settings)
    halves = training.resume(tmp_path / "halves", say=lambda _: None)
    assert count == 4
    assert whole.metrics() == halves.metrics()
    assert equal(whole.load_weights(), halves.load_weights())


@pytest.fixture(scope="module")
def run(parents: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run with adapters from the command line."""
    out = tmp_path_factory.mktemp("lora")
    words = ["train", "supcon", "--data", DATA, "--from", f"run:{parents['vit-s']}", "--lora", "4", "--lora-alpha", "2"]
    words += ["--lora-targets", "attention", "fc2", "--out", str(out), "--name", "run"]
    for name, value in (PROJECTED | {"recipe": "weak"}).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main(words) == 0
    return out / "run"


def test_the_command_line_sets_rank_factor_and_layers(run: Path) -> None:
    learner: Any = load_learner(run)
    layers = adapters.adapted(learner.encoder)
    assert len(layers) == 12
    assert not any(name.endswith("fc1") for name in layers)
    layer: Any = next(iter(layers.values()))
    assert layer.r["default"] == 4
    assert layer.scaling["default"] == 0.5


@pytest.mark.parametrize("ending", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])  # 10 seconds
def test_an_export_merges_adapters(run: Path, tmp_path: Path, ending: str) -> None:
    trained = cp.load(run)
    (made,) = trained.export(tmp_path / f"encoder{ending}")
    assert made.difference < 1e-5
    assert adapters.adapted(trained.learner)
    if ending == ".pt2":
        names = torch.export.load(made.path).state_dict
        assert not any("lora" in name for name in names)


def test_the_command_line_writes_adapters_for_peft(
    run: Path, parents: Mapping[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "new")]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert cli.main(["export", parents["vit-s"], "--format", "peft", "--out", str(tmp_path / "none")]) == 2
    assert "trained without lora" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_run_with_adapters_starts_another_and_teaches(run: Path, tmp_path: Path, undrawn: None) -> None:
    encoder: Any = load_learner(run).encoder
    experiment = Experiment.resolve("supcon", DATA, overrides=PROJECTED | {"start": str(run)})
    learner: Any = experiment.learner(experiment.task().facts, 0)
    learner.take_start()
    assert equal(learner.encoder.state_dict(), adapters.merged_state(encoder))

    teacher = trained("kd", tmp_path, "teacher", start=str(run), lora=2, kd_weight=0.0, ce_weight=1.0, teacher_epochs=0)
    student = trained("kd", tmp_path, "student", encoder="conv-s", teacher=str(teacher.path), epochs=1)
    assert student.facts()["teacher_encoder"] == "vit-s"
    assert student.metrics()[-1]["test/teacher_accuracy"] == pytest.approx(teacher.metrics()[-1]["test/accuracy"])


def test_a_run_with_adapters_continues_with_its_own_base(run: Path, tmp_path: Path, undrawn: None) -> None:
    config = Experiment.of_run(run).config
    after = training.train("supcon", config, data=DATA, parent=run, out=tmp_path, name="more", say=lambda _: None)
    ours, theirs = (adapters.base_state(load_learner(path).encoder) for path in (after.path, run))
    assert equal(ours, theirs)


@pytest.mark.parametrize(
    ("slug", "settings", "message"),
    [
        ("supcon", {"lora": 4}, "--from RUN or --pretrained"),
        ("supcon", {"lora": -1, "start": "x"}, "at least 1, got -1"),
        ("supcon", {"lora_targets": ("attention",)}, "lora_targets needs adapters"),
        ("supcon", {"lora_statistics": "train"}, "lora_statistics needs adapters"),
        ("supcon", {"lora": 4, "lora_alpha": -1.0, "start": "x"}, "lora_alpha must be > 0"),
        ("supcon", {"lora": 4, "lora_statistics": "still", "start": "x"}, "lora_statistics"),
        ("finetune-seg", {"lora": 4, "start": "x", "frozen": True}, "--frozen keeps the encoder"),
        ("promptkd", {"lora": 4, "pretrained": True}, "trains no encoder of its own"),
        ("promptkd", {"start": "x"}, "trains no encoder that another run"),
        ("diswot", {"lora": 4, "pretrained": True}, "trains no encoder of its own"),
        ("krr-st", {"lora": 4, "pretrained": True}, "trains no encoder of its own"),
    ],
)
def test_settings_that_do_not_fit_are_named(slug: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CounterpointError, match=message):
        Experiment.resolve(slug, None, overrides=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lora": 129}, "rank 129 .* width 128"), ({"lora": 2, "lora_targets": ("fc9",)}, "'fc9' matches no layer")],
)
def test_a_refused_start_leaves_nothing_on_disk(
    settings: dict[str, Any], message: str, parents: Mapping[str, str], tmp_path: Path
) -> None:
    with pytest.raises(CounterpointError, match=message):
        trained("supcon", tmp_path / "out", "x", **settings, **start_of("vit-s", parents))
    assert not (tmp_path / "out").exists()
