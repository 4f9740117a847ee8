"""MulKI: softened rows of ZSCL, identities of the chosen form, tasks, prototypes, connected weights, resuming, errors."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterpoint import functional as fn
from counterpoint import training
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, fitted
from counterpoint.systems.continual import mulki
from counterpoint.tasks.phases import task_figures
from interrupted import need_equal_ends
from launch import command_over_processes

PARITY = np.load(Path(__file__).parents[1] / "parity" / "mulki.npz")
TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
DATA = "digit-domains?train=40&test=20&domains=3"
TEACHER = (
    "fit:clip?data=digit-domains%3Forigin=1%26train=40%26test=20%26domains=3&image_encoder=mlp-s&text_encoder=tower-16-1-8"
    "&embedding=8&recipe=none&epochs=2&batch_size=24&context=16&lr=0.02"
)
SMALL = {"teacher": TEACHER, "batch_size": 20, "epochs": 2, "lr": 0.01, "warmup_epochs": 0}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def rows(n: int = 7, classes: int = 4, dim: int = 5) -> dict[str, Tensor]:
    return {
        "image": unit(draw(0, n, dim)),
        "text": unit(draw(1, classes, dim)),
        "labels": torch.arange(n) % (classes - 1),  # one class has no image in the batch
        "teacher_images": unit(draw(2, 2, n, dim)),
        "teacher_texts": unit(draw(3, 2, classes, dim)),
        "prototypes": unit(draw(4, classes, dim)),
    }


def built(data: str = DATA, **settings):
    experiment = Experiment.resolve("mulki", data, overrides=SMALL | settings)
    task = experiment.task()
    return experiment.learner(task.facts, 0), task


def begun(data: str = DATA, **settings):
    learner, task = built(data, **settings)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    return learner, task


# ----------------------------------------------------------------------------------------------------------- the equations


@TYPES
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_divergence_of_rows_and_its_gradient_equal_the_softened_rows_of_zscl(number, dtype, rtol):
    at = {
        name: torch.from_numpy(PARITY[f"case{number}/in/{name}"]).to(dtype)
        for name in ("student_rows", "teacher_rows", "prototypes")
    }
    student = at["student_rows"].requires_grad_()
    scale, temperature = (float(PARITY[f"case{number}/param/{name}"]) for name in ("scale", "temperature"))
    out = {name: float(PARITY[f"case{number}/out/{name}"]) for name in ("loss", "teacher_entropy", "kl")}
    found = fn.relational_distillation(student, at["teacher_rows"], at["prototypes"], scale, temperature)
    assert found.mean().item() == pytest.approx(out["kl"], rel=rtol, abs=1e-12)
    whole = temperature**2 * (found.mean() + out["teacher_entropy"])
    assert whole.item() == pytest.approx(out["loss"], rel=rtol, abs=1e-12)
    wanted = torch.from_numpy(PARITY[f"case{number}/grad/student_rows"]).to(dtype)
    mine = torch.autograd.grad(whole, student)[0]
    torch.testing.assert_close(mine, wanted, rtol=rtol, atol=rtol * max(1e-3, float(wanted.abs().max())))


def test_students_like_their_teachers_learn_nothing_from_them():
    at = rows()
    at["teacher_images"], at["teacher_texts"] = at["image"].expand(2, -1, -1), at["text"].expand(2, -1, -1)
    at["image"].requires_grad_()
    found = fn.mulki_loss(**at, logit_scale=20.0)
    assert found.integration.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(found.integration, at["image"])[0].abs().max() < 1e-12


@pytest.mark.parametrize("weights", ["adaptive", "equal"])
def test_two_equal_teachers_count_as_one(weights):
    at = rows()
    at["teacher_images"], at["teacher_texts"] = (at[name][:1] for name in ("teacher_images", "teacher_texts"))
    one = fn.mulki_loss(**at, logit_scale=9.0, weights=weights)
    twice = at | {name: at[name].expand(2, -1, -1) for name in ("teacher_images", "teacher_texts")}
    both = fn.mulki_loss(**twice, logit_scale=9.0, weights=weights)
    torch.testing.assert_close(both.loss, one.loss)
    assert (one.first.item(), both.first.item()) == (1.0, pytest.approx(0.5))


def test_a_teacher_that_is_certain_of_every_class_teaches_alone():
    at = rows()
    labels = at["labels"]
    at["teacher_images"][0] = at["teacher_texts"][0][labels]
    at["teacher_images"][1] = at["teacher_texts"][1][(labels + 1) % 4]
    found = fn.mulki_loss(**at, logit_scale=1e4)
    first = at | {name: at[name][:1] for name in ("teacher_images", "teacher_texts")}
    assert found.first.item() == pytest.approx(1)
    torch.testing.assert_close(found.loss, fn.mulki_loss(**first, logit_scale=1e4).loss)


def plain(at: dict[str, Tensor], s: float, temperature: float, lf: float) -> float:
    """Compute L_inter with adaptive weights by loops over images, classes and teachers."""

    def kl(a: Tensor, b: Tensor, bank: Tensor) -> Tensor:
        p, q = ((s / temperature * (x @ bank.T)).softmax(0) for x in (a, b))
        return (p * (p.log() - q.log())).sum()

    n, classes = len(at["image"]), len(at["text"])
    weight = torch.zeros(n, 2, dtype=torch.float64)
    for x in range(n):
        logs = [
            (s * (at["teacher_images"][j, x] @ at["teacher_texts"][j].T)).log_softmax(0)[at["labels"][x]]
            for j in (0, 1)
        ]
        weight[x] = torch.stack(logs).softmax(0)
    total = 0.0
    for j in (0, 1):
        old, words, bank = at["teacher_images"][j], at["teacher_texts"][j], at["prototypes"]
        for x in range(n):
            z = at["image"][x]
            term = lf * (z - old[x]).square().sum() + kl(old[x], z, words) + kl(old[x], z, bank)
            total += float(weight[x, j] * term) / n
        for c in range(classes):
            own = weight[at["labels"] == c, j]
            share = own.mean() if len(own) else weight[:, j].mean()
            total += float(share * kl(words[c], at["text"][c], bank)) / classes
    return total


def test_the_integration_is_the_weighted_sum_of_every_level():
    at = rows()
    found = fn.mulki_loss(**at, logit_scale=6.0, l1=0.3, l2=0.5, feature_weight=0.7, temperature=1.5)
    assert found.integration.item() == pytest.approx(plain(at, 6.0, 1.5, 0.7))
    wanted = found.classification + 0.3 * found.prototype + 0.5 * found.integration
    torch.testing.assert_close(found.loss, wanted)


def test_prototypes_of_each_teacher_stand_beside_it_alone():
    at = rows()
    banks = unit(draw(9, 2, 4, 5))
    alone = [
        fn.mulki_loss(
            **(at | {name: at[name][j : j + 1] for name in ("teacher_images", "teacher_texts")}),
            logit_scale=6.0,
            teacher_prototypes=banks[j : j + 1],
        ).integration
        for j in (0, 1)
    ]
    both = fn.mulki_loss(**at, logit_scale=6.0, weights="equal", teacher_prototypes=banks).integration
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    assert not torch.isclose(both, fn.mulki_loss(**at, logit_scale=6.0, weights="equal").integration)


def test_at_high_temperatures_the_divergence_is_half_the_squared_difference_of_centred_similarities():
    at = rows()
    factor = 0.1
    found = fn.relational_distillation(at["image"], at["teacher_images"][0], at["prototypes"], factor, 1.0)
    similar = (at["teacher_images"][0] - at["image"]) @ at["prototypes"].T
    centred = similar - similar.mean(1, keepdim=True)
    torch.testing.assert_close(found, factor**2 / 2 * centred.square().mean(1), rtol=0.05, atol=1e-6)
    far = fn.relational_distillation(at["image"], at["teacher_images"][0], at["prototypes"], 1.0, 1e4)
    assert far.max() < 1e-7


@pytest.mark.parametrize(
    ("losses", "wanted"), [((0.2, 0.2), (0.5, 0.5)), ((1.0, 2.0), (0.7311, 0.2689)), ((3.0, 0.0), (0.0474, 0.9526))]
)
def test_weights_of_teachers_are_a_softmax_of_their_losses(losses, wanted):
    found = fn.teacher_weights(torch.tensor([losses], dtype=torch.float64))
    assert found[0].tolist() == pytest.approx(wanted, abs=5e-5)


def test_a_teacher_without_probability_for_the_class_keeps_weights_finite():
    found = fn.teacher_weights(torch.tensor([[1e30, 1.0], [1e30, 1e30]], dtype=torch.float64))
    assert found.tolist() == [[0, 1], [0.5, 0.5]]


def test_orthonormal_prototypes_that_match_their_texts_have_the_known_loss():
    found = fn.prototype_alignment(torch.eye(5).double(), torch.eye(5).double(), 3.0)
    assert found.item() == pytest.approx(math.log(1 + 4 * math.exp(-3)))


def test_a_common_rotation_changes_nothing():
    at, turn = rows(), torch.linalg.qr(draw(8, 5, 5)).Q
    turned = {name: x if name == "labels" else x @ turn for name, x in at.items()}
    for one, other in zip(fn.mulki_loss(**at, logit_scale=8.0), fn.mulki_loss(**turned, logit_scale=8.0), strict=True):
        torch.testing.assert_close(one, other)


def test_one_class_one_image_and_equal_embeddings_are_finite():
    at = rows(1, 2)
    assert all(x.isfinite() for x in fn.mulki_loss(**(at | {"labels": torch.tensor([0])}), logit_scale=100.0))
    single = {
        name: x[..., :1, :] if x.ndim > 1 and name not in ("image", "teacher_images") else x for name, x in at.items()
    }
    found = fn.mulki_loss(**(single | {"labels": torch.tensor([0])}), logit_scale=100.0, feature_weight=0.0)
    assert found.loss.item() == pytest.approx(0, abs=1e-12)
    same = torch.ones(3, 5, dtype=torch.float64)
    assert fn.relational_distillation(same, same, same, 100.0).abs().max() < 1e-12


def test_prototypes_get_a_gradient_from_the_contrast_alone():
    at = rows()
    at["prototypes"].requires_grad_()
    for l1, moved in ((0.0, False), (0.5, True)):
        grad = torch.autograd.grad(fn.mulki_loss(**at, logit_scale=5.0, l1=l1).loss, at["prototypes"])[0]
        assert bool(grad.abs().max() > 1e-9) is moved


def test_updated_prototypes_keep_classes_without_images():
    bank, x = torch.eye(3).double(), unit(draw(0, 4, 3))
    found = mulki.prototypes_towards_means(bank, x, torch.tensor([0, 0, 1, 1]), 0.9)
    torch.testing.assert_close(found[0], unit(0.9 * bank[0] + 0.1 * x[:2].mean(0)))
    assert torch.equal(found[2], bank[2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": draw(0, 3, 5)}, "image, text, labels and prototypes must be"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "image, text, labels and prototypes must be"),
        ({"teacher_images": draw(0, 2, 6, 5)}, "teacher_images and teacher_texts must be"),
        ({"weights": "first"}, "weights must be"),
        ({"image": draw(0, 0, 5), "labels": torch.zeros(0, dtype=torch.int64)}, "image"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        fn.mulki_loss(**(rows() | {"logit_scale": 5.0} | change))


def test_rows_that_do_not_fit_are_named():
    x = draw(0, 4, 5)
    for call, said in (
        (lambda: fn.relational_distillation(x, x[:3], x, 1.0), "student_rows and teacher_rows must be"),
        (lambda: fn.relational_distillation(x, x, x[:, :3], 1.0), r"prototypes must be \[classes, 5\]"),
        (lambda: fn.prototype_alignment(x, x[:3], 1.0), "text and prototypes must be"),
        (lambda: fn.teacher_weights(x[0]), r"losses must be \[rows, teachers\]"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


# --------------------------------------------------------------------------------------------------------------- the tasks


def test_each_task_has_its_classes_and_its_teachers(monkeypatch):
    learner, task = built()
    seen, real = [], mulki.mulki_loss

    def spied(*arguments, **more):
        found = real(*arguments, **more)
        seen.append((learner.phase, arguments, found))
        return found

    monkeypatch.setattr(mulki, "mulki_loss", spied)
    fit(learner, task, bar=False)
    assert [phase for phase, *_ in seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert [len(arguments[3]) for _, arguments, _ in seen] == [1] * 4 + [2] * 8
    for phase, arguments, _ in seen:
        assert arguments[1].shape[0] == 10
        assert int(arguments[2].max()) < 10, phase
    # A task begins as its last teacher; then it departs from it. The original network never changes.
    first, later = seen[4][1], seen[7][1]
    torch.testing.assert_close(unit(first[0]), unit(first[3][1]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unit(later[0]), unit(later[3][1]), atol=1e-3)
    begin = fitted(TEACHER.removeprefix("fit:")).state_dict()
    held = learner.origin.module.network.learner.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in begin.items())
    assert seen[0][2].integration.item() == pytest.approx(0, abs=1e-5)


def test_prototypes_begin_as_class_means_of_the_original_network_and_move_with_the_student():
    learner, task = begun()
    survey = learner.survey
    learner.position.stage = 1
    learner.enter_phase(1, survey)
    labels = np.asarray(task.split("train").labels)
    batch = survey.batch("train", np.flatnonzero(labels == 13))
    mean = unit(unit(learner.origin(batch["image"])).mean(0))
    torch.testing.assert_close(learner.bank[13], mean, rtol=1e-4, atol=1e-5)
    assert learner.bank[:10].abs().max() == 0
    before = learner.bank.clone()
    images = survey.batch("train", np.flatnonzero(learner.phase_of(survey, "train") == 1)[:20])
    learner.loss(images | {"views": [images["image"]]})
    learner.end_step()
    assert not torch.equal(before[10:20], learner.bank[10:20])
    assert learner.bank[10:20].norm(dim=1).tolist() == pytest.approx([1.0] * 10, abs=1e-5)


@pytest.mark.parametrize("bank", ["fixed", "per_teacher", "learnable"])
def test_other_prototypes_stay_belong_to_a_teacher_or_are_learned(bank):
    learner, task = built(prototypes=bank)
    begin = {}

    def watch(phase, survey, real=learner.enter_phase):
        real(phase, survey)
        begin[phase] = learner.bank.detach().clone()

    learner.enter_phase = watch
    row = fit(learner, task, bar=False)[-1]
    own = slice(20, 30)
    assert torch.equal(begin[2][own], learner.bank[own]) == (bank != "learnable")
    assert bool(learner.banks[1].abs().max() > 0) == (bank == "per_teacher")
    assert np.isfinite(row["train/loss"])


@pytest.mark.parametrize(("weights", "first"), [("equal", 0.5), ("first", 1.0), ("second", 1.0), ("adaptive", None)])
def test_weights_choose_the_teachers(weights, first):
    learner, task = built(weights=weights)
    row = fit(learner, task, bar=False)[-1]
    if first is not None:
        assert row["train/first_weight"] == pytest.approx(first)
    learner.position.stage = 2
    assert [number for number, _ in learner.teachers()] == {"first": [0], "second": [1]}.get(weights, [0, 1])


def test_plain_fine_tuning_asks_no_teacher(monkeypatch):
    learner, task = built(l1=0.0, l2=0.0)
    monkeypatch.setattr(learner.origin, "_call", None)  # a call would fail
    monkeypatch.setattr(mulki.MulKILearner, "_begin_task", lambda *_: None)
    monkeypatch.setattr(mulki.MulKILearner, "measures", lambda *_: {})
    row = fit(learner, task, bar=False)[-1]
    assert row["train/loss"] == pytest.approx(row["train/classification"])
    assert "train/integration" not in row


def test_weights_are_connected_within_a_task_and_after_it():
    learner, _ = begun(connect="both", connect_every=1, connect_share=0.25)
    survey = learner.survey
    learner.enter_phase(0, survey)
    first = copy.deepcopy(learner.encoder.state_dict())
    name = next(name for name, value in learner.encoder.named_parameters() if value.ndim == 2)
    seen = []
    for step in range(3):
        with torch.no_grad():
            for parameter in learner.encoder.parameters():
                parameter.add_(0.1 * (step + 1))
        seen.append(learner.encoder.state_dict()[name].clone())
        learner.end_step()
    learner._connect()
    wanted = 0.75 * torch.stack(seen).mean(0) + 0.25 * first[name]  # of task 0, the network before is the original
    torch.testing.assert_close(learner.encoder.state_dict()[name], wanted)


def test_the_matrix_gives_the_measures_of_both_kinds_of_candidates():
    learner, task = built()
    row = fit(learner, task, bar=False)[-1]
    for at, split in enumerate(("valid", "test")):
        own, seen = (learner.history[at, :, :, way].double().numpy() for way in (0, 1))
        assert (own >= seen - 1e-6).all()  # fewer candidates
        assert np.allclose(own[0, 0], seen[0, 0])
        for name, value in task_figures(own).items():
            assert row[f"{split}/{name}"] == pytest.approx(value, abs=1e-6)
        assert row[f"{split}/seen_last"] == pytest.approx(seen[-1].mean(), abs=1e-6)
        assert row[f"{split}/seen_last"] == pytest.approx(row[f"{split}/accuracy"], abs=1e-6)
        assert 0 <= row[f"{split}/zero_shot"] <= 1
    shown = learner.figures(Survey(task, learner))
    assert shown["Accuracy after each phase"]["names"] == ["plain", "inverted", "transposed"]
    assert np.shape(shown["Accuracy among all classes so far"]["values"]) == (3, 3)


def test_domains_with_the_same_classes_are_domain_incremental():
    learner, task = built(DATA + "&shared=1")
    fit(learner, task, bar=False)
    assert learner.members.all()
    assert torch.equal(learner.history[..., 0], learner.history[..., 1])
    assert "Accuracy among all classes so far" not in learner.figures(Survey(task, learner))


def test_all_phases_at_once_are_one_stage_with_all_classes():
    learner, task = built(joint=True, first_epochs=1)
    row = fit(learner, task, bar=False)[-1]
    assert len(learner.classes) == 30
    assert np.isfinite(row["test/last"])
    assert "test/transfer" not in row


def test_figures_of_tasks_follow_the_protocol():
    found = task_figures(np.array([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.8, 0.5, 0.9]]))
    assert found["last"] == pytest.approx(2.2 / 3)
    assert found["average"] == pytest.approx(5.2 / 9)
    assert found["transfer"] == pytest.approx((0.2 + (0.1 + 0.3) / 2) / 2)
    assert found["forgetting"] == pytest.approx((0.1 + 0.3) / 2)


# ------------------------------------------------------------------------------------------------------- runs and processes


def test_interrupted_and_resumed_it_ends_the_same(tmp_path, monkeypatch, undrawn):
    settings = SMALL | {"connect": "both", "connect_every": 2}
    config = Experiment.resolve("mulki", DATA, overrides=settings).config
    # In each task.
    need_equal_ends(monkeypatch, mulki.MulKILearner, "mulki", config, DATA, (1, 6, 11), tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    fitted(TEACHER.removeprefix("fit:"))
    words = ["train", "mulki", "--data", DATA, "--out", str(tmp_path), "--name", "two"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command_over_processes(words, tmp_path)
    config = Experiment.resolve("mulki", DATA, overrides=SMALL).config
    run = training.train("mulki", config, data=DATA, out=tmp_path, name="one", say=lambda _: None)
    one, two = run.metrics()[-1], Run.open(tmp_path / "two").metrics()[-1]
    for name in ("train/loss", "train/integration", "train/first_weight", "test/last"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


def test_a_run_starts_another_stream_and_is_measured_again(tmp_path, undrawn):
    config = Experiment.resolve("mulki", DATA, overrides=SMALL).config
    run = training.train("mulki", config, data=DATA, out=tmp_path, name="one", say=lambda _: None)
    again = training.evaluate(run.path, say=lambda _: None)
    assert again["last"] == pytest.approx(run.metrics()[-1]["test/last"], abs=1e-6)
    more = training.train("mulki", parent=run.path, out=tmp_path, name="more", say=lambda _: None)
    assert more.metrics()[-1]["test/zero_shot"] == pytest.approx(run.metrics()[-1]["test/last"], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"l1": -1.0}, "l1 must be at least 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"prototype_momentum": 1.5}, "prototype_momentum must lie in 0..1"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in 0\.\.1, 1 not included"),
        ({"weights": "third"}, "unknown weights 'third'"),
        ({"prototypes": "none"}, "unknown prototypes 'none'"),
        ({"connect": "all"}, "unknown connect 'all'"),
        ({"connect_every": 0}, "connect_every must be at least 1"),
        ({"first_epochs": -1}, "must not be negative"),
        ({"teacher": "file:x.npz"}, "embeddings cannot be trained; name a network"),
        ({"teacher": "resnet-s"}, "unknown teacher of pictures and texts"),
        ({"templates": "a photo"}, "templates must hold"),
        ({"start": "runs/x"}, "trains no encoder that another run could start"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, said):
    with pytest.raises(CounterpointError, match=said):
        built(**settings)


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        ("digits?size=8", {}, "have no domains, which are the phases of a stream; set --phases"),
        (DATA, {"phases": 4}, "--phases 4 exceeds the 3 domains"),
        (DATA, {"batch_size": 41}, "fewer than a batch of 41"),
    ],
)
def test_data_that_do_not_fit_are_named(data, settings, said):
    with pytest.raises(DataError, match=said):
        begun(data, **settings)


def test_a_phase_of_one_class_and_names_that_the_network_cannot_tell_apart_are_named(monkeypatch):
    learner, task = built()
    labels = task.data.train.labels
    monkeypatch.setattr(task.data.train, "labels", np.where(labels // 10 == 1, 10, labels))
    with pytest.raises(
        DataError, match="inverted has training pictures of 1 class, and nothing to tell it from; use fewer phases"
    ):
        learner.begin(Survey(task, learner))
    monkeypatch.setattr(type(learner.encoder), "class_rows", lambda *_: torch.ones(30, 8))
    with pytest.raises(CounterpointError, match="the same embedding of their texts"):
        begun()


def test_a_stream_by_class_is_class_incremental():
    data = "stream:digit-domains%3Ftrain=40%26test=20%26domains=3%26shared=1?by=class&phases=3&order=2,0,1"
    learner, task = built(data)
    row = fit(learner, task, bar=False)[-1]
    assert learner.names == ["seven to nine", "zero to three", "four to six"]
    assert learner.members.sum(0).tolist() == [1] * 10  # each class has one phase
    assert learner.members.sum(1).tolist() == [3, 4, 3]
    assert row["test/seen_last"] <= row["test/last"]
