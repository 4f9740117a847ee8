"""VL2V-ADiP: the authors' numbers, both stages, the average over the valley, resuming, embeddings from a file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core.loss_valley import LossValley, as_vector
from counterpoint.engine.fit import fit
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.distillation import vl2v_adip as file
from embedded import embeddings
from interrupted import cut_and_resumed

PARITY = np.load(Path(__file__).parents[1] / "parity" / "vl2v-adip.npz")
DATA = "styled-shapes?train=32&valid=16&test=16&size=16&label=shape&unseen=bright"
SMALL: dict[str, Any] = {
    "encoder": "conv-s", "pretrained": False, "recipe": "none", "batch_size": 16, "epochs": 3, "align_epochs": 2,
    "start": "", "evaluate_every": 9,
}  # fmt: skip


def get(case: int, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    value = torch.from_numpy(PARITY[f"case{case}/{name}"]).clone()
    return value.to(dtype) if value.is_floating_point() else value


def settings(**changed: Any) -> dict[str, Any]:
    return SMALL | {"teacher": embeddings(32, 8)} | changed


# --- equations


@pytest.mark.parametrize("case", range(2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_logits_and_gradients_equal_the_authors(case: int, dtype: torch.dtype) -> None:
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    names = ("in/features", "weight/proj_weight", "weight/proj_bias")
    features, weight, bias = (get(case, name, dtype).requires_grad_() for name in names)
    prototypes = fn.class_prototypes(get(case, "in/text_embeddings", dtype))
    scale = float(get(case, "param/logit_scale"))
    torch.testing.assert_close(scale * prototypes, get(case, "out/class_weights", dtype), **close)
    loss = fn.vl2v_loss(
        features, get(case, "in/labels"), get(case, "in/teacher_image", dtype), prototypes, weight, bias,
        float(get(case, "param/lmd")),
    )  # fmt: skip
    torch.testing.assert_close(loss, get(case, "out/loss", dtype), **close)
    loss.backward()
    for value, name in ((features, "features"), (weight, "proj_weight"), (bias, "proj_bias")):
        torch.testing.assert_close(value.grad, get(case, f"grad/{name}", dtype), **close)
    logits = fn.cosine_text_logits((features @ weight.T + bias).detach(), prototypes, scale)
    torch.testing.assert_close(logits, get(case, "out/logits", dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [2, 3])
def test_the_average_over_the_valley_equals_the_authors(case: int) -> None:
    names = ("steps_per_eval", "n_converge", "n_tolerance", "tolerance_ratio")
    numbers = [PARITY[f"case{case}/param/{name}"].item() for name in names]
    average, first, last, count, dead = fn.swad_loss_valley(
        get(case, "in/weights"), get(case, "in/val_losses"), *numbers
    )
    torch.testing.assert_close(average, get(case, "out/averaged"), rtol=1e-9, atol=1e-12)
    expected = [
        int(PARITY[f"case{case}/out/{name}"]) for name in ("start_step", "end_step", "n_averaged", "dead_valley")
    ]
    assert [first, last, count, int(dead)] == expected


def test_a_series_that_never_converges_returns_its_last_segment() -> None:
    weights = torch.arange(8.0)[:, None]
    average, first, last, count, dead = fn.swad_loss_valley(weights, [4.0, 3.0, 2.0, 1.0], 2)
    assert (average.item(), first, last, count, dead) == (6.5, 6, 7, 2, False)


def test_lam_of_one_ignores_labels_and_lam_of_zero_pictures() -> None:
    rows, text = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.eye(3)
    weights = torch.eye(3), torch.zeros(3)
    labels = torch.tensor([0, 1, 2, 0])
    assert fn.vl2v_loss(rows, labels, rows, text, *weights, 1.0).item() == pytest.approx(-1)
    assert torch.equal(
        fn.vl2v_loss(rows, labels, rows, text, *weights, 0.0), fn.vl2v_loss(rows, labels, -rows, text, *weights, 0.0)
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, r"labels must lie in 0\.\.2"),
        ({"lmd": 1.5}, "lmd"),
        ({"teacher_image": torch.ones(2, 4)}, "teacher_image"),
        ({"features": torch.ones(0, 3), "labels": torch.zeros(0, dtype=torch.long)}, "features"),
        ({"proj_bias": torch.ones(4)}, "proj_weight must be"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    good = {
        "features": torch.ones(2, 3), "labels": torch.tensor([0, 1]), "teacher_image": torch.ones(2, 3),
        "class_text": torch.ones(3, 3), "proj_weight": torch.eye(3), "proj_bias": torch.zeros(3), "lmd": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fn.vl2v_loss(**(good | changed))


# --- training


def test_each_stage_trains_its_own_part_by_the_loss_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, bool]] = []
    before = file.vl2v_loss

    def noted(features: Tensor, *rest: Any) -> Tensor:
        calls.append((features.requires_grad, rest[3].requires_grad))
        return before(features, *rest)

    monkeypatch.setattr(file, "vl2v_loss", noted)
    Experiment.resolve("vl2v-adip", DATA, overrides=settings(align_epochs=1, epochs=1)).run(0)
    assert calls == [(False, True)] * 2 + [(True, False)] * 2


def test_the_backbone_becomes_the_mean_of_the_steps_in_the_valley(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    before = LossValley.update

    def noted(self: LossValley, weights: Tensor) -> None:
        seen.append(weights.clone())
        before(self, weights)

    monkeypatch.setattr(LossValley, "update", noted)
    monkeypatch.setattr(file.VL2V, "_on_valid", lambda self, survey: (1.0, 0.5))  # always in the valley
    experiment = Experiment.resolve("vl2v-adip", DATA, overrides=settings(n_converge=1, n_tolerance=1))
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    fit(learner, task, evaluate_every=9)
    assert len(seen) == 6  # three epochs of two steps
    # The first segment only begins the valley, as in SWAD.
    torch.testing.assert_close(as_vector(learner.averaged()), torch.stack(seen[2:]).mean(0))


def test_the_best_projector_of_the_first_stage_begins_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.9, 0.1, 0.0, 0.0])
    monkeypatch.setattr(file.VL2V, "_on_valid", lambda self, survey: (1.0, next(scores)))
    states: list[Tensor] = []
    before = file.VL2V.end_epoch

    def noted(self: Any, epoch: int) -> None:
        before(self, epoch)
        states.append(self.projector.weight.detach().clone())

    monkeypatch.setattr(file.VL2V, "end_epoch", noted)
    Experiment.resolve("vl2v-adip", DATA, overrides=settings(epochs=2, swad=False)).run(0)
    assert torch.equal(states[2], states[0])
    assert not torch.equal(states[1], states[0])


@pytest.mark.parametrize("stop", [3, 7])
def test_an_interrupted_run_resumes_bit_for_bit_in_each_stage(tmp_path: Path, stop: int) -> None:
    experiment = Experiment.resolve("vl2v-adip", DATA, overrides=settings())

    whole = Run.create(tmp_path, experiment.record(0), "whole")
    experiment.run(0, run=whole)
    cut = cut_and_resumed(experiment, file.VL2V, stop, tmp_path)
    ours, theirs = cut.load_weights(), whole.load_weights()
    assert ours.keys() == theirs.keys()
    assert not any(name.startswith("valley") for name in ours)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("objective", ["ce", "kd"])
def test_baselines_train_a_linear_classifier_with_the_backbone(objective: str) -> None:
    experiment = Experiment.resolve(
        "vl2v-adip", DATA, overrides=settings(objective=objective, epochs=1, align_epochs=0)
    )
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    assert learner.projector.weight.shape[0] == 8
    before = learner.projector.weight.detach().clone()
    rows = fit(learner, task, evaluate_every=1)
    assert not torch.equal(learner.projector.weight, before)
    assert {"test/accuracy", "test/unseen_accuracy"} <= rows[-1].keys()


def test_cutmix_mixes_both_targets_by_the_share_that_remains() -> None:
    experiment = Experiment.resolve("vl2v-adip", DATA, overrides=settings(teacher="run:x", cutmix=0.0), check=False)
    task = experiment.measured(experiment.source())
    facts = {"size": 16, "channels": 3, "classes": 8, "encoder": "conv-s", "examples": 32, "teacher_dim": 6}
    learner = Experiment.resolve(
        "vl2v-adip", DATA, overrides=settings(teacher="run:x", cutmix=1.0), check=False
    ).learner(facts, 0)
    from counterpoint.tasks.images import ImageBatches

    batch = learner.prepare(ImageBatches(task.data.train)[list(range(8))], torch.Generator().manual_seed(0))
    assert 0 < float(batch["lam"].mean()) < 1
    learner.teacher_rows = lambda batch: torch.ones(8, 6)
    learner.prototypes.copy_(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
    features = learner.encoder(batch["views"][0])
    weights = learner.projector.weight, learner.projector.bias, 0.5
    a, b = (
        fn.vl2v_rows(features, batch[name], torch.ones(8, 6), learner.prototypes, *weights)
        for name in ("label", "label_b")
    )
    expected = (batch["lam"] * a + (1 - batch["lam"]) * b).mean()
    torch.testing.assert_close(learner.loss(batch)["loss"], expected)


def test_statistics_of_batch_normalisation_stay(tmp_path: Path) -> None:
    experiment = Experiment.resolve("vl2v-adip", DATA, overrides=settings(epochs=1, align_epochs=1))
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    kept = {name: value.clone() for name, value in learner.encoder.named_buffers()}
    fit(learner, task, evaluate_every=9)
    assert kept
    assert all(torch.equal(value, kept[name]) for name, value in learner.encoder.named_buffers())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"align_epochs": -1}, "align_epochs"),
        ({"lmd": 2.0}, "lmd"),
        ({"align_lr": 0.0}, "align_lr"),
        ({"cutmix": 0.5}, "cutmix needs a teacher that sees the mixed pictures"),
        ({"teacher": "simclr"}, "teacher of pictures and texts"),
        ({"templates": "a photo"}, "templates must hold {}"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CounterpointError, match=message):
        Experiment.resolve("vl2v-adip", DATA, overrides=settings(**changed))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train": np.ones((31, 6), np.float32)}, "has 31 rows of train, the training split has 32 pictures"),
        ({"text": np.ones((7, 6), np.float32)}, "has texts of 7 classes, the data has 8"),
        (
            {"train": np.full((32, 6), np.nan, np.float32)},
            "train has 32 rows of zeros, NaN or infinity, the first is row 0",
        ),
        ({"text": np.ones((8, 5), np.float32)}, "train must be"),
        ({"text": None}, "lacks the array text"),
        ({"classes": np.array(list("abcdefgh"))}, "has no text of 8 classes, such as 'disc'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_training(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    name = embeddings(32, 8, folder=tmp_path, **more)
    with pytest.raises(DataError, match=message):
        Experiment.resolve("vl2v-adip", DATA, overrides=settings(teacher=name)).run(0, run=None, loop=Loop())


def test_texts_of_a_file_are_ordered_by_their_classes(tmp_path: Path) -> None:
    from counterpoint.tasks.class_teachers import Table

    text = np.eye(3, 6, dtype=np.float32)
    table = Table.read(embeddings(4, 3, folder=tmp_path, text=text, classes=np.array(["c", "a", "b"])))
    torch.testing.assert_close(table.texts(("a", "b", "c"))[:, 0], torch.from_numpy(text[[1, 2, 0]]))
