"""VLM-OOD distillation: the authors' numbers, identities of each loss, novel classes, captions, resuming."""

from __future__ import annotations

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
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.systems.distillation import vlm_ood_distill as file
from embedded import embeddings
from interrupted import cut_and_resumed

PARITY = np.load(Path(__file__).parents[1] / "parity" / "vlm-ood-distill.npz")
DATA = "styled-shapes?train=64&valid=32&test=32&size=16&label=shape-colour"
SMALL: dict[str, Any] = {
    "encoder": "conv-s", "recipe": "none", "batch_size": 16, "epochs": 2, "evaluate_every": 9, "base": 0.5,
}  # fmt: skip


def settings(**changed: Any) -> dict[str, Any]:
    return SMALL | {"teacher": embeddings(64, 16)} | changed


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_the_gradient_equal_the_authors(case: int, dtype: torch.dtype) -> None:
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}

    def rows(name: str) -> Tensor:
        return torch.from_numpy(PARITY[f"case{case}/{name}"]).clone().to(dtype)

    def number(name: str) -> Any:
        return PARITY[f"case{case}/param/{name}"].item()

    student = rows("in/student").requires_grad_()
    switches = ("filter_misaligned", "use_cls", "vlalign_only", "use_mse", "use_mse_unnorm", "use_contrastive")
    loss, parts = fn.vlm_ood_distillation_loss(
        student, rows("in/teacher"), rows("in/text"), torch.from_numpy(PARITY[f"case{case}/in/labels"]),
        temperature=number("temperature"), topk=number("topk"), **{name: bool(number(name)) for name in switches},
        bidirectional=bool(number("contrastive_bidirectional")),
        captions=rows("in/captions") if number("use_caption") else None,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, rows("out/loss"), **close)
    for name, value in parts.items():
        torch.testing.assert_close(value, rows(f"out/{name}"), **close)
    torch.testing.assert_close(student.grad, rows("grad/student"), **close)


def test_a_student_that_equals_its_teacher_has_no_imitation_and_no_alignment_loss() -> None:
    rows, text = draw((5, 4), (3, 4))
    labels = torch.tensor([0, 1, 2, 0, 1])
    loss, parts = fn.vlm_ood_distillation_loss(
        2 * rows, rows, text, labels, vlalign_only=True, filter_misaligned=False, use_contrastive=False
    )
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert parts.keys() == {"language_loss", "mse_loss", "contrastive_loss"}


def test_the_squared_distance_is_two_minus_twice_the_cosine() -> None:
    student, teacher, text = draw((5, 4), (5, 4), (3, 4))
    off = {"use_cls": False, "use_contrastive": False}
    loss, _ = fn.vlm_ood_distillation_loss(student, teacher, text, torch.zeros(5, dtype=torch.long), **off)
    torch.testing.assert_close(loss, (2 - 2 * F.cosine_similarity(student, teacher)).mean())


def test_all_classes_give_the_whole_divergence_and_one_class_gives_none() -> None:
    student, teacher = draw((5, 4), (5, 4))
    labels = torch.zeros(5, dtype=torch.long)
    whole = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(fn.vision_language_alignment(student, teacher, labels, 9, False), whole)
    assert fn.vision_language_alignment(student, teacher, labels, 1, False).item() == 0


def test_the_filter_keeps_pictures_that_the_teacher_gets_right_and_none_gives_zero() -> None:
    student, teacher = draw((5, 4), (5, 4))
    right = teacher.argmax(1)
    wrong = (right + 1) % 4
    mixed = torch.where(torch.arange(5) < 2, right, wrong)
    own = fn.vision_language_alignment(student[:2], teacher[:2], right[:2], 3)
    torch.testing.assert_close(fn.vision_language_alignment(student, teacher, mixed, 3), own)
    assert fn.vision_language_alignment(student, teacher, wrong, 3).item() == 0


def test_captions_of_the_same_class_are_no_negatives() -> None:
    student, captions = (F.normalize(x, dim=1) for x in draw((3, 4), (3, 4)))
    labels = torch.tensor([0, 0, 1])
    logits = student @ captions.T
    logits[0, 1] = logits[1, 0] = -torch.inf
    torch.testing.assert_close(fn.caption_contrast(student, captions, labels), F.cross_entropy(logits, torch.arange(3)))


def test_a_single_picture_has_no_contrast() -> None:
    student, teacher = (F.normalize(x, dim=1) for x in draw((1, 4), (1, 4)))
    assert fn.feature_contrast(student, teacher, 0.07).item() == pytest.approx(0, abs=1e-9)


def test_zero_features_have_a_finite_gradient() -> None:
    student = torch.zeros(2, 4, requires_grad=True)
    loss, _ = fn.vlm_ood_distillation_loss(student, torch.eye(4)[:2], torch.eye(4), torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"topk": 0}, "topk"),
        ({"teacher": torch.ones(2, 3)}, "teacher"),
        ({"text": torch.ones(3, 2)}, "text must be"),
        ({"labels": torch.tensor([0, 3])}, r"labels must lie in 0\.\.2"),
        ({"captions": torch.ones(3, 4)}, "captions"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    good = {
        "student": torch.ones(2, 4),
        "teacher": torch.ones(2, 4),
        "text": torch.ones(3, 4),
        "labels": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        fn.vlm_ood_distillation_loss(**(good | changed))


# --- training


def test_a_step_calls_the_loss_with_base_texts_and_kept_features(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    before = file.vlm_ood_distillation_loss

    def noted(student: Tensor, teacher: Tensor, text: Tensor, labels: Tensor, **given: Any) -> Any:
        calls.append({"teacher": teacher, "text": text, "labels": labels} | given)
        return before(student, teacher, text, labels, **given)

    monkeypatch.setattr(file, "vlm_ood_distillation_loss", noted)
    teacher = settings()["teacher"]
    rows = Experiment.resolve("vlm-ood-distill", DATA, overrides=settings(epochs=1)).run(0)
    table = np.load(teacher.partition(":")[2])["train"]
    assert len(calls) == 4
    assert calls[0]["text"].shape == (8, 6)
    assert all(any(np.array_equal(row, own) for own in table) for row in calls[0]["teacher"].numpy())
    assert int(calls[0]["labels"].max()) < 8
    names = ("accuracy", "base_accuracy", "novel_accuracy", "harmonic_mean", "base_macro_recall", "novel_macro_recall")
    assert {f"test/{name}" for name in names} <= rows[-1].keys()


def test_captions_need_a_line_for_each_picture_and_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a\n" * 63)
    with pytest.raises(CounterpointError, match="captions need a teacher with a text encoder"):
        Experiment.resolve("vlm-ood-distill", DATA, overrides=settings(captions=str(captions)))
    network = Network()
    monkeypatch.setattr("counterpoint.tasks.class_teachers.open_network", lambda name: network)
    monkeypatch.setattr("counterpoint.tasks.class_teachers.teacher_width", lambda name: 6)
    given = settings(teacher="hf:x", captions=str(captions), epochs=1)
    with pytest.raises(DataError, match="has 63 captions for 64 training pictures"):
        Experiment.resolve("vlm-ood-distill", DATA, overrides=given).run(0)
    captions.write_text("".join(f"picture {n}\n" for n in range(64)))
    seen: list[Tensor] = []
    before = file.vlm_ood_distillation_loss

    def noted(*rows: Tensor, **given: Any) -> Any:
        seen.append(given["captions"])
        return before(*rows, **given)

    monkeypatch.setattr(file, "vlm_ood_distillation_loss", noted)
    found = Experiment.resolve("vlm-ood-distill", DATA, overrides=given).run(0)
    assert seen[0].shape == (16, 6)
    assert "test/teacher_novel_accuracy" in found[-1]


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    experiment = Experiment.resolve("vlm-ood-distill", DATA, overrides=settings())
    whole = Run.create(tmp_path, experiment.record(0), "whole")
    experiment.run(0, run=whole)
    cut = cut_and_resumed(experiment, file.VLMOOD, 5, tmp_path)
    ours = cut.load_weights()
    assert all(torch.equal(ours[name], value) for name, value in whole.load_weights().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"cls": False, "vlalign": 0, "mse": False, "contrast": False}, "all losses are off"),
        ({"base": 0.0}, "base must lie above 0"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CounterpointError, match=message):
        Experiment.resolve("vlm-ood-distill", DATA, overrides=settings(**changed))


def test_the_page_lists_base_and_novel_classes() -> None:
    experiment = Experiment.resolve("vlm-ood-distill", DATA, overrides=settings(epochs=1))
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    fit(learner, task, evaluate_every=9)
    table = learner.figures(Survey(task, learner))["Classes"]
    assert table["columns"] == ["class", "kind", "student"]
    assert [row[1] for row in table["rows"]] == ["base"] * 8 + ["novel"] * 8


class Network(torch.nn.Module):
    """A network of pictures and texts with random weights."""

    dim, scale = 6, 10.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = torch.nn.Linear(3, 6)

    def images(self, images: Tensor) -> Tensor:
        return self.tower(images.mean((2, 3)))

    def texts(self, texts: list[str]) -> Tensor:
        return torch.stack(
            [torch.randn(6, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts]
        )
