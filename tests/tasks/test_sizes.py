"""A student that is larger than its teacher is allowed, with one note when training starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from counterpoint.engine.learner import Learner
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import parameters
from counterpoint.experiment import Experiment

DIGITS = "digits?size=8&train=60&held_out=0.05&valid=0.05"
SHAPES = "styled-shapes?train=32&valid=16&test=16&size=16&label=shape"
TEXTS = "moving-objects?train=32&grounded=32&test=20&words=20"
CHATS = "grid-chats?train=12&valid=4&test=4&grid=2&cell=8&most=2&questions=0&pairs=12"
ANSWERS = {"vocabulary": 300, "context": 48, "model": "llava-16-1-2"}
QUESTIONS = "digit-questions?train=12&captions=12&test=1&watched=1"
COMD = ANSWERS | {"teacher": "llava-16-1-2", "teacher_epochs": 12, "teacher_lr": 0.1, "new_tokens": 4}
PAIRS = "clustered-pairs?train=48&test=16&clusters=4"
KD = (
    "fit:kd?data=digits%3Fsize=8%26train=60%26held_out=0.05%26valid=0.05"
    "&encoder=vit-xs&kd_weight=0.0&teacher_epochs=0&epochs=1&batch_size=20&recipe=none"
)
TAUGHT = {"encoder": "conv-s", "teacher_encoder": "mlp-s", "teacher_epochs": 1, "recipe": "none"}
TOWERS = {
    "image_encoder": "tower-8-1-8",
    "text_encoder": "tower-8-1-8",
    "embedding": 8,
    "context": 16,
    "recipe": "none",
}
CLIP = {"teacher": "CLIP", "pretrained": False, "recipe": "none", "encoder": "conv-s"}
STEPS = {"batch_size": 16, "epochs": 1, "evaluate_every": 9}
# System, data, settings, and whether the student is larger.
CASES: list[tuple[str, str, dict[str, Any], bool]] = [
    ("kd", DIGITS, TAUGHT, True),
    ("kd", DIGITS, TAUGHT | {"encoder": "mlp-s", "teacher_encoder": "conv-s"}, False),
    ("rkd", DIGITS, TAUGHT, True),
    ("fitnets", DIGITS, TAUGHT | {"encoder": "resnet-s", "teacher_encoder": "conv-s"}, True),
    ("crd", DIGITS, TAUGHT, True),
    ("attention-transfer", DIGITS, TAUGHT | {"encoder": "resnet-s", "teacher_encoder": "resnet-s"}, False),
    ("diswot", DIGITS, TAUGHT | {"relation_weight": 0.0, "channel_weight": 0.0}, True),
    ("kd3", "web-digits?train=40&web=20&others=28", TAUGHT | {"encoder": "resnet-s", "teacher_encoder": "conv-s"}, True),
    ("hybrid-distill", DIGITS, {"encoder": "vit-xs", "feature_teacher": KD, "relation_weight": 0.0, "recipe": "none"}, False),
    ("vl2v-adip", SHAPES, CLIP | {"start": ""}, True),
    ("vlm-ood-distill", SHAPES, CLIP, True),
    ("promptkd", SHAPES, CLIP | {"student": "", "encoder": "vit-s"}, True),
    ("vidlankd", TEXTS, {"encoder": "text-16-1-2", "teacher_encoder": "text-8-1-2", "vocabulary": 300, "teacher_epochs": 1}, True),
    ("vidlankd", TEXTS, {"encoder": "text-8-1-2", "vocabulary": 300, "teacher_epochs": 1}, False),
    ("gopro", SHAPES, {"teacher": "CLIP"}, False),
    ("mulki", SHAPES, {"teacher": "CLIP", "recipe": "none", "phases": 1}, False),
    ("tinyclip", SHAPES, TOWERS | {"teacher": "CLIP", "inherit": "none", "image_encoder": "conv-s"}, True),
    ("tinyclip", SHAPES, TOWERS | {"teacher": "CLIP", "inherit": "auto"}, False),
    ("llava-mod", CHATS, ANSWERS | {"teacher": "llava-8-1-2"}, True),
    ("llava-mod", CHATS, ANSWERS | {"teacher": "llava-24-1-2"}, False),
    ("comd", QUESTIONS, COMD | {"model": "llava-24-1-2"}, True),
    ("comd", QUESTIONS, COMD | {"model": "llava-8-1-2"}, False),
    ("dcd", PAIRS, {"embedding": 16, "fusion_layers": 2, "student_layers": (0, 1, 1), "candidates": 8}, True),
    ("dcd", PAIRS, {"embedding": 16, "fusion_layers": 2, "student_layers": (0, 1), "candidates": 8}, False),
]  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    experiment = Experiment.resolve("clip", SHAPES.replace("&label=shape", ""), overrides=TOWERS | STEPS)
    run = Run.create(tmp_path_factory.mktemp("clip"), experiment.record(0), "clip")
    experiment.run(0, run=run)
    return f"run:{run.path}"


@pytest.mark.parametrize(("slug", "data", "settings", "larger"), CASES)
def test_every_system_with_a_teacher_counts_student_and_teacher_when_a_stage_begins(
    slug: str, data: str, settings: dict[str, Any], larger: bool, clip: str
) -> None:
    given = STEPS | settings | ({"teacher": clip} if settings.get("teacher") == "CLIP" else {})
    experiment = Experiment.resolve(slug, data, overrides=given)
    task = experiment.task()
    learner: Any = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    own, its = learner.sizes()
    assert its > 0
    assert (own > its) == larger


def test_a_larger_student_is_noted_once_with_both_numbers(tmp_path: Path) -> None:
    notes: list[str] = []
    experiment = Experiment.resolve("kd", DIGITS, overrides=STEPS | TAUGHT)
    run = Run.create(tmp_path, experiment.record(0), "run")
    experiment.run(0, run=run, say=notes.append)
    (note,) = (line for line in notes if line.startswith("note: the student has"))
    own, its = (int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", note))
    assert own > its > 0


def test_a_system_without_a_teacher_has_no_sizes_to_compare() -> None:
    assert Learner().sizes() is None


def test_a_parameter_of_several_networks_counts_once() -> None:
    one = torch.nn.Linear(3, 2)
    assert parameters(one, torch.nn.Sequential(one, torch.nn.Linear(2, 2))) == 8 + 6
