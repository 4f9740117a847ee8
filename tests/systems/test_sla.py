"""SLA against the authors' numbers, its identities and edges; it trains as every method and resumes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint import cli
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.systems.images import sla as room
from counterpoint.systems.images.sla import SLAConfig, aggregate, expand, identity_logits, joint_label, named, sla_loss
from interrupted import need_equal_ends

NUMBERS = np.load(Path(__file__).parents[1] / "parity" / "sla.npz")
DATA = "digits?size=8&train=60&held_out=0.05&valid=0.05"
SMALL: dict[str, Any] = {"encoder": "mlp-s", "batch_size": 20, "epochs": 1, "evaluate_every": 1}


def case(number: int) -> dict[str, np.ndarray]:
    return {k.split("/", 1)[1]: NUMBERS[k] for k in NUMBERS.files if k.startswith(f"case{number}/")}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_value_and_gradient_equal_the_authors_numbers(number: int, dtype: torch.dtype, rtol: float) -> None:
    at = case(number)
    leaves = [
        torch.from_numpy(at[f"in/{name}"]).to(dtype).requires_grad_()
        for name in ("joint_logits", "single_logits")
        if f"in/{name}" in at
    ]
    label, m = torch.from_numpy(at["in/label"]), int(at["param/num_transforms"])
    options = float(at["param/temperature"]), bool(at["param/sum_over_transforms"])
    loss = sla_loss(leaves[0], label, m, leaves[1] if len(leaves) > 1 else None, *options)
    found = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(
        loss.detach().double(), torch.tensor(float(at["out/loss"]), dtype=torch.float64), rtol=rtol, atol=0
    )
    for name, gradient in zip(("joint_logits", "single_logits"), found, strict=False):
        torch.testing.assert_close(gradient.double(), torch.from_numpy(at[f"grad/{name}"]), rtol=rtol, atol=rtol)
    joint = leaves[0].detach().double()
    assert np.array_equal(joint_label(label, m), at["out/joint_label"])
    used = leaves[1].detach().double()[::m] if len(leaves) > 1 else identity_logits(joint, m)
    for ours, theirs in ((aggregate(joint, m), "aggregated_logits"), (used, "single_logits_used")):
        torch.testing.assert_close(ours, torch.from_numpy(at[f"out/{theirs}"]), rtol=max(rtol, 1e-6), atol=1e-6)


def test_copies_equal_the_authors_for_every_set() -> None:
    at = case(3)
    images = torch.from_numpy(at["in/images"])
    sets = [name.removeprefix("out/") for name in at if name.startswith("out/")]
    assert len(sets) >= 5
    for name in sets:
        assert np.array_equal(expand(images, name), at[f"out/{name}"]), name
        assert len(named(name)) == len(at[f"out/{name}"]) // len(images)


def test_joint_logits_of_the_class_alone_are_augmentation_and_of_a_sum_multi_task() -> None:
    h, g, label = draw(8, 3), draw(8, 4, seed=1), torch.tensor([0, 2])
    ce = F.cross_entropy(h, label.repeat_interleave(4))
    torch.testing.assert_close(sla_loss(h.repeat_interleave(4, 1), label, 4), ce + np.log(4))
    both = (h[:, :, None] + g[:, None]).flatten(1)
    torch.testing.assert_close(sla_loss(both, label, 4), ce + F.cross_entropy(g, torch.arange(4).repeat(2)))


def test_self_distillation_costs_nothing_where_the_second_head_agrees() -> None:
    h, label = draw(2, 3), torch.tensor([0, 2])
    joint = h[:, None, :, None].expand(2, 4, 3, 4).reshape(8, 12)
    found = sla_loss(joint, label, 4, h.repeat_interleave(4, 0)) - sla_loss(joint, label, 4)
    torch.testing.assert_close(found, F.cross_entropy(h, label))


def test_extreme_logits_have_a_finite_loss_and_gradient() -> None:
    joint, second = (1e4 * draw(8, 12)).requires_grad_(), (1e4 * draw(8, 3, seed=1)).requires_grad_()
    loss = sla_loss(joint, torch.tensor([0, 2]), 4, second)
    gradients = torch.autograd.grad(loss, (joint, second))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_one_transformation_is_the_plain_cross_entropy() -> None:
    logits, label = draw(5, 3), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(sla_loss(logits, label, 1), F.cross_entropy(logits, label))
    assert torch.equal(aggregate(logits, 1), logits)
    assert torch.equal(identity_logits(logits, 1), logits)


def test_arguments_that_do_not_fit_are_refused_by_name() -> None:
    label = torch.tensor([0, 2])
    for call, words in (
        (lambda: sla_loss(draw(7, 12), label, 4), "joint_logits must be"),
        (lambda: sla_loss(draw(8, 10), label, 4), "joint_logits must be"),
        (lambda: sla_loss(draw(8, 12), label[:1], 4), "label must be"),
        (lambda: sla_loss(draw(8, 12), torch.tensor([0, 3]), 4), r"label must lie in 0\.\.2"),
        (lambda: sla_loss(draw(8, 12), label, 4, draw(8, 4)), "single_logits must be"),
        (lambda: sla_loss(draw(8, 12), label, 4, draw(8, 3), temperature=0.0), "temperature"),
        (lambda: sla_loss(draw(0, 12), label[:0], 4), "empty batch"),
        (lambda: expand(draw(1, 3, 4, 5), "rotation"), "square"),
        (lambda: expand(draw(1, 1, 4, 4), "color_perm"), "three channels"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(CounterpointError, match="rotation"):
        expand(draw(1, 3, 4, 4), "rotations")
    assert expand(draw(1, 3, 4, 5), "rotation2").shape == (2, 3, 4, 5)


def test_settings_that_do_not_fit_are_refused_by_name() -> None:
    for settings, words in (
        ({"method": "da"}, "method"),
        ({"method": "augment", "self_distill": True}, "self_distill"),
        ({"inference": "distilled"}, "--self-distill"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(CounterpointError, match=words):
            SLAConfig(**settings)
    with pytest.raises(CounterpointError, match="grey pictures"):
        Experiment.resolve("sla", DATA, overrides=SMALL | {"transformations": "color_perm"}).run(0)


def test_the_function_that_passes_is_the_function_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(joint: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(tuple(joint.shape))
        return sla_loss(joint, *args)

    monkeypatch.setattr(room, "sla_loss", counted)
    rows = Experiment.resolve("sla", DATA, overrides=SMALL | {"self_distill": True}).run(0)
    assert calls
    assert set(calls) == {(80, 40)}
    heads = {name.removesuffix("accuracy") for name in rows[-1] if name.endswith("accuracy")}
    assert {"test/single_", "test/distilled_", "test/"} <= heads
    assert "test/aggregated_" not in heads  # it is `accuracy`


@pytest.mark.parametrize("method", ["plain", "augment", "multi-task"])
def test_baselines_train_and_are_judged_on_the_picture_itself(method: str) -> None:
    rows = Experiment.resolve("sla", DATA, overrides=SMALL | {"method": method}).run(0)
    assert "test/single_accuracy" not in rows[-1]  # it is `accuracy`
    assert ("train/transformations" in rows[0]) == (method == "multi-task")
    if method == "plain":
        assert rows[-1]["test/aggregated_accuracy"] == rows[-1]["test/accuracy"]


def test_inference_chooses_the_head_and_changes_no_weight() -> None:
    first = Experiment.resolve("sla", DATA, overrides=SMALL).run(0)[-1]
    second = Experiment.resolve("sla", DATA, overrides=SMALL | {"inference": "single"}).run(0)[-1]
    assert second["test/accuracy"] == first["test/single_accuracy"]
    assert second["test/aggregated_accuracy"] == first["test/accuracy"]


def test_colours_change_places_before_they_are_normalised() -> None:
    from counterpoint.views.images import normalise

    config = SLAConfig(encoder="mlp-s", transformations="color_perm3")
    learner = room.SLA(config, SimpleNamespace(size=8, channels=3, classes=4), 0)
    image = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(learner.copied(normalise(image))[1], normalise(image[:, [1, 2, 0]])[0])


@pytest.mark.usefixtures("drawn")
def test_a_run_from_the_command_line_shows_the_votes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "sla", "--data", DATA, "--encoder", "mlp-s", "--batch-size", "20", "--epochs", "1"]
    assert cli.main([*words, "--out", str(tmp_path), "--name", "one"]) == 0
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "Votes of the copies" in page
    assert "Transformations that the joint head recognises" in page


def test_the_network_sees_rotated_copies_with_the_labels_of_the_method() -> None:
    images, label = torch.rand(2, 3, 8, 8), torch.tensor([3, 1])
    facts = SimpleNamespace(size=8, channels=3, classes=4)
    batch = {"views": [images], "label": label}
    wanted = expand(images, "rotation")
    for method in ("sla", "augment", "multi-task"):
        learner = room.SLA(SLAConfig(encoder="mlp-s", method=method), facts, 0).eval()
        features = learner.encoder(wanted)
        if method == "sla":
            expected = sla_loss(learner.joint(features), label, 4)
        else:
            expected = F.cross_entropy(learner.classifier(features), label.repeat_interleave(4))
        if method == "multi-task":
            expected = expected + F.cross_entropy(learner.transformed(features), torch.arange(4).repeat(2))
        torch.testing.assert_close(learner.loss(batch)["loss"], expected)


def test_interrupted_and_resumed_it_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Experiment.resolve("sla", DATA, overrides=SMALL | {"epochs": 2}).config
    need_equal_ends(monkeypatch, room.SLA, "sla", config, DATA, (1, 2), tmp_path)
