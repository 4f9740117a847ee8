"""DCD: the authors' numbers, weights, mined captions, stages, teachers of other runs, resuming, retrieval by all pairs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.engine.fit import fit
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.systems.distillation import dcd as file
from counterpoint.tasks.class_teachers import open_network
from interrupted import cut_and_resumed

PARITY = np.load(Path(__file__).parents[1] / "parity" / "dcd.npz")
DATA = "clustered-pairs?train=48&test=16&clusters=4"
SMALL: dict[str, Any] = {
    "embedding": 16, "batch_size": 16, "epochs": 2, "teacher_epochs": 2, "candidates": 8, "teacher_candidates": 4,
    "num_hard": 3, "fusion_layers": 3, "student_layers": (0, 2), "evaluate_every": 9,
}  # fmt: skip
CAPTIONS = {
    "image_encoder": "conv-s", "embedding": 16, "heads": 2, "fusion_layers": 2, "student_layers": (0,), "batch_size": 8,
    "epochs": 1, "teacher_epochs": 1, "retrieved": 8, "dropout": 0.1, "vocabulary": 300, "context": 8,
}  # fmt: skip


def get(case: int, name: str) -> Tensor:
    return torch.from_numpy(PARITY[f"case{case}/{name}"]).clone()


def number(case: int, name: str) -> float:
    return float(PARITY[f"case{case}/param/{name}"])


def scores(seed: int, n: int = 4, k: int = 5) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(**changed: Any) -> tuple[Any, Any]:
    """Return a learner before its first step, and its task."""
    experiment = Experiment.resolve("dcd", DATA, overrides=SMALL | changed)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    return learner, task


# --- equations


@pytest.mark.parametrize("case", [0, 1])
def test_the_weighted_soft_label_and_its_gradient_equal_the_authors(case: int) -> None:
    s, t = get(case, "in/student_scores").requires_grad_(), get(case, "in/teacher_scores")
    found = fn.weighted_soft_label_loss(s, t, number(case, "temperature"), number(case, "alpha"))
    for value, name in zip(found, ("loss", "distill", "task"), strict=True):
        torch.testing.assert_close(value, get(case, f"out/wsl_{name}"), rtol=1e-9, atol=1e-12)
    found.loss.backward()
    torch.testing.assert_close(s.grad, get(case, "grad/wsl_student_scores"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dynamic_loss_and_its_gradient_equal_the_authors(case: int, dtype: torch.dtype) -> None:
    # The released code's labels are float32, so its binary cross-entropy has 7 digits for float64 scores (see below).
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-8}
    s, t = get(case, "in/student_scores").to(dtype).requires_grad_(), get(case, "in/teacher_scores").to(dtype)
    found = fn.dynamic_distillation_loss(s, t, number(case, "temperature"), number(case, "alpha"), "uniform")
    for value, name in zip(found, ("loss", "distill", "task"), strict=True):
        torch.testing.assert_close(value, get(case, f"out/{name}").to(dtype), **near)
    if dtype == torch.float64:
        torch.testing.assert_close(found.distill, get(case, "out/distill"), rtol=1e-9, atol=1e-12)
    found.loss.backward()
    torch.testing.assert_close(s.grad, get(case, "grad/student_scores").to(dtype), **near)


@pytest.mark.parametrize("case", [0, 1])
def test_with_float32_labels_the_weights_give_the_authors_numbers_to_the_last_digit(case: int) -> None:
    s, t, alpha = get(case, "in/student_scores").requires_grad_(), get(case, "in/teacher_scores"), number(case, "alpha")
    label = F.one_hot(torch.tensor(0), s.shape[1]).float()
    weights = fn.uncertainty_weights(t).task
    task = torch.stack(
        [F.binary_cross_entropy_with_logits(row, label) * w for row, w in zip(s, weights, strict=True)]
    ).sum()
    torch.testing.assert_close(task, get(case, "out/task"), rtol=1e-9, atol=1e-12)
    (alpha * (t - s).square().mean() + (1 - alpha) * task).backward()
    torch.testing.assert_close(s.grad, get(case, "grad/student_scores"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [2, 3])
def test_selection_and_the_loss_of_all_candidates_equal_the_authors(case: int) -> None:
    s, t, many = get(case, "in/student_scores"), get(case, "in/teacher_scores"), int(number(case, "num_hard"))
    assert torch.equal(fn.select_hard_negatives(t, many), get(case, "out/selected"))
    by_rank = fn.mined_distillation_loss(s, t, many, number(case, "alpha"), "rank", "uniform")
    torch.testing.assert_close(by_rank, get(case, "out/loss"), rtol=1e-5, atol=1e-6)
    aligned = fn.mined_distillation_loss(s, t, many, number(case, "alpha"), "aligned", "uniform")
    assert torch.allclose(aligned, by_rank) == (case == 2)  # in case 2 the own caption is first in every row


def test_weights_sum_to_one_and_an_uncertain_picture_counts_more_in_the_task_loss() -> None:
    weights = fn.uncertainty_weights(torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert float(weights.task.sum()) == pytest.approx(1)
    assert float(weights.imitation.sum()) == pytest.approx(1)
    assert weights.task[0] < weights.task[1]
    assert weights.imitation[0] > weights.imitation[1]


def test_equal_teacher_rows_weigh_all_pictures_equally() -> None:
    s, t = scores(0), scores(1)[:1].expand(4, -1)
    per_sample, uniform = (
        fn.dynamic_distillation_loss(s, t, 1.0, 0.3, kind).loss for kind in ("per_sample", "uniform")
    )
    torch.testing.assert_close(per_sample, uniform)
    torch.testing.assert_close(fn.uncertainty_weights(t).imitation, torch.full((4,), 0.25, dtype=torch.float64))


def test_the_imitation_weighs_each_picture_by_the_teachers_certainty() -> None:
    s, t = scores(0), 3 * scores(1)
    entropy = -(t.softmax(1) * t.log_softmax(1)).sum(1)
    r = (1 - entropy / entropy.sum()).square().softmax(0)
    expected = (r * (t - s).square().mean(1)).sum()
    torch.testing.assert_close(fn.dynamic_distillation_loss(s, t, 2.0).distill, expected)


def test_a_student_equal_to_its_teacher_has_nothing_to_imitate() -> None:
    assert float(fn.dynamic_distillation_loss(scores(0), scores(0)).distill) == 0


def test_a_teacher_certain_of_every_picture_gives_uniform_weights() -> None:
    weights = fn.uncertainty_weights(torch.tensor([[4000.0, 0.0], [0.0, 4000.0], [5000.0, 0.0]]))
    torch.testing.assert_close(weights.task, torch.full((3,), 1 / 3))
    torch.testing.assert_close(weights.imitation, torch.full((3,), 1 / 3))


def test_one_picture_has_the_weight_one() -> None:
    s, t = scores(0, 1), scores(1, 1)
    found = fn.dynamic_distillation_loss(s, t)
    torch.testing.assert_close(found.distill, (s - t).square().mean())
    torch.testing.assert_close(found.task, F.binary_cross_entropy_with_logits(s, torch.eye(5, dtype=s.dtype)[:1]))


def test_centring_ignores_a_constant_of_each_row() -> None:
    s, t = scores(0), scores(0) + torch.arange(4.0)[:, None]
    assert float(fn.dynamic_distillation_loss(s, t, centre=True).distill) == pytest.approx(0, abs=1e-12)
    assert float(fn.dynamic_distillation_loss(s, t).distill) > 1


def test_more_hard_negatives_than_captions_means_all() -> None:
    assert fn.select_hard_negatives(scores(0), 9).shape == (4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.select_hard_negatives(scores(0), 0), "num_hard"),
        (lambda: fn.select_hard_negatives(scores(0, 3, 1), 1), "a caption that is not its own"),
        (lambda: fn.dynamic_distillation_loss(scores(0), scores(1, 3)), "student_scores and teacher_scores must be"),
        (lambda: fn.dynamic_distillation_loss(scores(0, 0), scores(1, 0)), "student_scores is an empty batch"),
        (lambda: fn.dynamic_distillation_loss(scores(0), scores(1), alpha=1.5), "alpha"),
        (lambda: fn.dynamic_distillation_loss(scores(0), scores(1), 0.0), "temperature"),
        (lambda: fn.dynamic_distillation_loss(scores(0), scores(1) * math.nan), "teacher_scores holds NaN"),
        (lambda: fn.dynamic_distillation_loss(scores(0), scores(1), 1.0, 0.2, "other"), "imitation_weighting"),
        (lambda: fn.dynamic_distillation_loss(scores(0), scores(1), task_weighting="other"), "task_weighting"),
        (lambda: fn.mined_distillation_loss(scores(0), scores(1), 2, 0.2, "other"), "teacher_order"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- training


def test_a_step_mines_with_the_teacher_and_trains_the_students_scorer_by_the_loss_that_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    select, loss = file.select_hard_negatives, file.dynamic_distillation_loss

    def selected(teacher: Tensor, many: int) -> Tensor:
        calls.append(("select", tuple(teacher.shape), teacher.requires_grad))
        return select(teacher, many)

    def computed(s: Tensor, t: Tensor, *rest: Any) -> Any:
        calls.append(("loss", tuple(s.shape), s.requires_grad, t.requires_grad))
        return loss(s, t, *rest)

    monkeypatch.setattr(file, "select_hard_negatives", selected)
    monkeypatch.setattr(file, "dynamic_distillation_loss", computed)
    monkeypatch.setattr(file.DCD, "figures", lambda self, survey: {})
    Experiment.resolve("dcd", DATA, overrides=SMALL | {"epochs": 1, "teacher_epochs": 1}).run(0)
    assert calls == [("select", (16, 8), False), ("loss", (16, 4), True, False)] * 3


def test_the_student_starts_from_the_chosen_layers_and_leaves_the_teacher_and_the_encoders_as_they_are() -> None:
    learner, task = started(vector_encoder="mlp")
    learner.survey = None
    kept: dict[str, Tensor] = {}
    before = file.DCD.start

    def noted(self: Any, survey: Any) -> None:
        before(self, survey)
        assert torch.equal(self.student.layers[1].weight, self.teacher.layers[2].weight)
        assert torch.equal(self.student.head.weight, self.teacher.head.weight)
        assert self.student.head.weight.data_ptr() != self.teacher.head.weight.data_ptr()
        kept.update({name: value.clone() for name, value in self.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file.DCD, "start", noted)
        fit(learner, task, evaluate_every=9)
    changed = {name for name, value in learner.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed
    assert all(name.startswith("student.") for name in changed)


def test_the_teacher_scores_without_dropout_while_the_student_trains() -> None:
    experiment = Experiment.resolve("dcd", "digit-captions?train=16&valid=0.05", overrides=CAPTIONS)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    learner.position.stage = 1
    learner.train()
    batch = next(iter(task.train_loader(0, learner.position)))
    batch = learner.prepare(batch, torch.Generator().manual_seed(0))
    learner.loss(batch)
    assert not learner.teacher.training
    assert not learner.encoders.training
    assert learner.student.training


@pytest.mark.parametrize(
    ("changed", "shape"),
    [({"mining": False}, (16, 8)), ({"objective": "ce"}, (16, 4)), ({"objective": "wsl"}, (16, 4))],
)
def test_every_objective_scores_mined_captions_or_all(changed: dict[str, Any], shape: tuple[int, int]) -> None:
    learner, task = started(**changed)
    learner.position.stage = 1
    batch = learner.prepare(next(iter(task.train_loader(0, learner.position))), torch.Generator().manual_seed(0))
    seen: list[tuple[int, ...]] = []
    forward = learner.scores
    learner.scores = lambda *rest: seen.append(tuple(rest[-1].shape)) or forward(*rest)
    loss = learner.loss(batch)["loss"]
    loss.backward()
    assert seen == [shape]
    assert learner.student.head.weight.grad is not None


def test_a_batch_without_a_whole_pair_is_refused_and_a_process_without_one_scores_nothing() -> None:
    experiment = Experiment.resolve("dcd", "digit-captions?train=16&valid=0.05", overrides=CAPTIONS)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    batch = learner.prepare(next(iter(task.train_loader(0, learner.position))), torch.Generator().manual_seed(0))
    batch["present"] = {name: torch.zeros_like(there) for name, there in batch["present"].items()}
    with pytest.raises(CounterpointError, match="no item of a batch has both image and text"):
        learner.loss(batch)
    none = torch.zeros(0, dtype=torch.long)
    image, text = learner.pictures(batch, none), learner.side("text", batch["pool"])
    assert learner.scores(learner.student, image, text, batch["candidates"][none]).shape == (0, 8)


def test_chunks_do_not_change_the_scores() -> None:
    learner, task = started()
    learner.double()
    batch = learner.prepare(next(iter(task.train_loader(0, learner.position))), torch.Generator().manual_seed(0))
    image, text = (x.double() for x in (batch["inputs"]["first"], batch["pool"]))
    sides = learner.side("first", image), learner.side("second", text)
    whole = learner.chunked(learner.student, *sides, batch["candidates"])
    learner.config.pairs = 5
    torch.testing.assert_close(learner.chunked(learner.student, *sides, batch["candidates"]), whole)
    torch.testing.assert_close(learner.scores(learner.student, *sides, batch["candidates"]), whole)


@pytest.mark.parametrize("stop", [3, 9])
def test_an_interrupted_run_resumes_bit_for_bit_in_each_stage(tmp_path: Path, stop: int, undrawn: None) -> None:
    experiment = Experiment.resolve("dcd", DATA, overrides=SMALL)
    whole = Run.create(tmp_path, experiment.record(0), "whole")
    experiment.run(0, run=whole)
    cut = cut_and_resumed(experiment, file.DCD, stop, tmp_path)
    ours, theirs = cut.load_weights(), whole.load_weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_scorer_trained_alone_teaches_another_run_and_is_not_part_of_it(tmp_path: Path) -> None:
    alone = Experiment.resolve("dcd", DATA, overrides=SMALL | {"teacher": "none"})
    large = Run.create(tmp_path, alone.record(0), "large")
    alone.run(0, run=large)
    teacher = load_learner(large)
    assert len(teacher.student.layers) == 3
    experiment = Experiment.resolve("dcd", DATA, overrides=SMALL | {"teacher": f"run:{large.path}"})
    run = Run.create(tmp_path, experiment.record(0), "student")
    rows = experiment.run(0, run=run)
    assert {"test/mean_r1", "test/teacher_mean_r1", "test/candidate_loss"} <= rows[-1].keys()
    student = load_learner(run)
    assert torch.equal(student.heads["first"].weight, teacher.heads["first"].weight)
    assert not any(name.startswith(("teacher", "master")) for name in run.load_weights())


def test_a_scorer_of_pairs_cannot_teach_embeddings() -> None:
    name = "fit:dcd?data=digit-captions%3Ftrain=24%26valid=0.05&teacher=none&" + "&".join(
        f"{key}={value}" for key, value in CAPTIONS.items() if key != "student_layers"
    )
    with pytest.raises(CounterpointError, match="does not embed pictures and texts; name a run of clip or siglip"):
        open_network(name)


def test_a_run_of_another_system_cannot_teach() -> None:
    name = "fit:clip?data=clustered-pairs%3Ftrain=24%26test=8&embedding=8&epochs=1&batch_size=8&evaluate_every=9"
    with pytest.raises(CounterpointError, match="is no run of dcd, whose scorers of pairs can teach"):
        started(teacher=name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embedding": 32}, "has embedding 16, this student 32"),
        ({"context": 7}, "has context 50, this student 7: .*--context 50"),
        ({"vector_encoder": "mlp"}, "has vector_encoder as-is, this student mlp: .*--vector-encoder as-is"),
        (
            {"student_layers": (0, 5)},
            "student_layers .* must name 2 layers of the teacher, which has the layers 0 to 2",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_the_first_step(changed: dict[str, Any], message: str) -> None:
    teacher = (
        "fit:dcd?data=clustered-pairs%3Ftrain=24%26test=8&teacher=none&embedding=16&fusion_layers=3&epochs=1"
        "&batch_size=8&candidates=4&evaluate_every=9"
    )
    with pytest.raises(CounterpointError, match=message):
        started(teacher=teacher, **changed)


@pytest.mark.usefixtures("drawn")
def test_pictures_and_captions_train_by_the_tokens_of_both_and_draw_a_page(tmp_path: Path) -> None:
    experiment = Experiment.resolve(
        "dcd", "digit-captions?train=24&valid=0.05", overrides=CAPTIONS | {"image_encoder": "vit-s"}
    )
    run = Run.create(tmp_path, experiment.record(0), "run")
    rows = experiment.run(0, run=run)
    assert 0 <= rows[-1]["test/mean_recall"] <= 1
    learner = load_learner(run)
    side = learner.side("image", torch.zeros(2, 3, 28, 28)) if "image" in learner.kinds else None
    assert side is not None
    assert side.states.shape[1] > 1
    with pytest.raises(CounterpointError, match="no embeddings"):
        learner.predict({"inputs": {}, "part": "embedded"})


def test_figures_show_the_hardest_captions_and_both_scorers() -> None:
    experiment = Experiment.resolve("dcd", DATA, overrides=SMALL)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    found = learner.eval().figures(learner.survey)
    gallery, table = found["What the teacher finds hard"], found["Student and teacher"]
    row = gallery["parts"][0]["rows"][0]
    assert row["found"][0]["item"] == row["query"]
    assert [cell["right"] for cell in row["found"]] == [True] + [False] * 5
    assert [line[:2] for line in table["rows"]] == [["teacher", 3], ["student", 2]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student_layers": (0, 3)}, "student_layers must name layers of the teacher, 0 to 2"),
        ({"student_layers": ()}, "student_layers"),
        ({"num_hard": 0}, "num_hard"),
        ({"candidates": 1}, "candidates must be at least 2"),
        ({"teacher_candidates": 1}, "teacher_candidates must be at least 2"),
        ({"alpha": 2.0}, "alpha"),
        ({"warmup": 1.0}, "warmup"),
        ({"fusion": "sum"}, "fusion"),
        ({"fusion": "coattention", "heads": 3}, "multiple of heads"),
        ({"objective": "kl"}, "objective"),
        ({"teacher_order": "random"}, "teacher_order"),
        ({"teacher": "clip"}, "teacher must be run:RUN"),
        ({"distill_temperature": 0.0}, "distill_temperature"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CounterpointError, match=message):
        Experiment.resolve("dcd", DATA, overrides=SMALL | changed)
