"""`counterpoint distill`: settings of each method, run directories, resuming, the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from counterpoint import cli, training
from counterpoint import distilling as room
from counterpoint.engine.teachers import parameters
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, finished, load_learner
from embedded import embeddings

DATA = "digits?size=8&train=60&held_out=0.05&valid=0.05"
SMALL: dict[str, Any] = {"epochs": 1, "batch_size": 20, "recipe": "none", "evaluate_every": 1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = SMALL | {"encoder": "conv-s", "teacher_epochs": 0, "kd_weight": 0.0, "ce_weight": 1.0}
    config = Experiment.resolve("kd", DATA, overrides=settings).config
    run = training.train("kd", config, data=DATA, out=tmp_path_factory.mktemp("runs"), name="big", say=lambda _: None)
    return f"run:{run.path}"


def test_each_method_gets_teacher_and_student_by_its_own_names() -> None:
    assert room.settings_of("kd", "run:runs/x", "conv-s", {"epochs": 3, "base": 0.5}) == {
        "teacher": "runs/x", "encoder": "conv-s", "epochs": 3,
    }  # fmt: skip
    assert room.settings_of("vl2v-adip", "hf:x", "conv-s", {"base": 0.5}) == {
        "teacher": "hf:x", "encoder": "conv-s", "base": 0.5,
    }  # fmt: skip
    assert {"kd", "rkd", "crd", "vl2v-adip", "vlm-ood-distill", "kd3"} <= set(room.distillers())
    assert not {"simclr", "gopro", "dcd", "vidlankd"} & set(room.distillers())


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("conv-s", {"student": "", "encoder": "conv-s"}),
        ("hf:small", {"student": "hf:small"}),
        ("run:x", {"student": "run:x"}),
    ],
)
def test_a_method_that_adapts_a_network_of_pictures_and_texts_gets_it_as_student(
    student: str, expected: dict[str, str]
) -> None:
    assert room.settings_of("promptkd", "hf:x", student, {}) == {"teacher": "hf:x", **expected}


@pytest.mark.parametrize(
    ("methods", "name", "given", "message"),
    [
        (["gopro"], "hf:x", {}, "gopro learns from no teacher that is named"),
        (["simclr"], "run:x", {}, "simclr learns from no teacher that is named; methods that do: "),
        (["dcd"], "run:x", {}, "dcd learns from no teacher that is named; methods that do: "),
        (["kd"], "hf:x", {}, "kd, .* learn from a run of a labelled system"),
        (["kd", "kd"], "run:x", {}, "each once"),
        (["vl2v-adip"], "hf:x", {"colour": 1}, "no method has the setting 'colour'"),
    ],
)
def test_bad_requests_are_refused_before_training(
    methods: list[str], name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(CounterpointError, match=message):
        room.distil(methods, name, "conv-s", DATA, given=given)


@pytest.mark.slow
def test_students_are_kept_measured_and_not_trained_again(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "distill",
        "--teacher",
        teacher,
        "--student",
        "mlp-s",
        "--data",
        DATA,
        "--method",
        "kd",
        "rkd",
        "--seeds",
        "2",
    ]
    words += ["--out", str(tmp_path), "--set", *(f"{key}={value}" for key, value in SMALL.items())]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "95 % interval" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"distill-{slug}-{seed}" for slug in ("kd", "rkd") for seed in (0, 1)
    ]
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("trained again"))
    given = dict(SMALL)
    record = room.distil(["kd", "rkd"], teacher, "mlp-s", DATA, seeds=2, given=given, out=tmp_path)
    row = record["rows"][0]
    assert row["metric"] == "accuracy"
    assert row["low"] <= row["mean"] <= row["high"]
    assert row["teacher"] is not None
    assert row["parameters"] < row["teacher_parameters"]
    assert row["images_a_second"] > 0
    with pytest.raises(CounterpointError, match="is a run with other settings"):
        room.distil(["kd"], teacher, "mlp-s", DATA, given=given | {"kd_weight": 0.5}, out=tmp_path)


PAIRS = "styled-shapes?train=32&valid=16&test=16&size=8"


@pytest.fixture(scope="module")
def pair_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    towers = {"image_encoder": "tower-16-2-8", "text_encoder": "tower-16-2-8", "embedding": 12, "context": 9}
    config = Experiment.resolve("clip", PAIRS, overrides=SMALL | towers | {"batch_size": 16}).config
    out = tmp_path_factory.mktemp("pairs")
    return f"run:{training.train('clip', config, data=PAIRS, out=out, name='clip', say=lambda _: None).path}"


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("tower-8-1-8", {"inherit": "manual", "image_encoder": "tower-8-1-8", "text_encoder": "tower-8-1-8", "embedding": 12}),
        ("tower-8-1-8-2", {"inherit": "manual", "image_encoder": "tower-8-1-8-2", "text_encoder": "tower-8-1-8"}),
        ("teacher", {"inherit": "auto", "image_encoder": "tower-16-2-8", "text_encoder": "tower-16-2-8", "context": 9}),
        ("conv-s", {"inherit": "none", "image_encoder": "conv-s"}),
    ],
)  # fmt: skip
def test_a_student_s_name_says_how_tinyclip_begins(pair_teacher: str, student: str, expected: dict[str, Any]) -> None:
    found = room.settings_of("tinyclip", pair_teacher, student, {})
    assert found | expected == found
    assert room.settings_of("tinyclip", "hf:x", student, {})["inherit"] == "none"
    assert room.settings_of("tinyclip", pair_teacher, student, {"inherit": "none"})["inherit"] == "none"


@pytest.mark.slow
def test_a_pair_of_towers_is_distilled_and_measured_beside_its_teacher(
    pair_teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    words = ["distill", "--teacher", pair_teacher, "--student", "tower-8-1-8", "--data", PAIRS, "--method", "tinyclip"]
    words += ["--seeds", "2", "--out", str(tmp_path), "--set", "epochs=1", "batch_size=16", "recipe=none"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "mean_recall" in shown
    assert "image_zero_shot" in shown
    given = {"epochs": 1, "batch_size": 16, "recipe": "none"}
    record = room.distil(["tinyclip"], pair_teacher, "tower-8-1-8", PAIRS, seeds=2, given=given, out=tmp_path)
    retrieval, accuracy = record["rows"]
    teacher = load_learner(finished(pair_teacher.removeprefix("run:"), "clip"))
    of_teacher = training.evaluate(pair_teacher.removeprefix("run:"), say=lambda _: None)
    for row, metric in ((retrieval, "mean_recall"), (accuracy, "image_zero_shot")):
        assert row["metric"] == metric
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["teacher"] == pytest.approx(of_teacher[metric])
    student = load_learner(finished(record["runs"][0], "tinyclip"))
    assert retrieval["parameters"] == parameters(student.encoders, student.heads)
    assert retrieval["teacher_parameters"] == parameters(teacher)
    assert retrieval["onnx_bytes"] > 4 * retrieval["parameters"]
    assert retrieval["images_a_second"] > 0
    assert retrieval["teacher_images_a_second"] > 0


def test_a_teacher_that_is_a_file_has_no_size(tmp_path: Path) -> None:
    name = embeddings(60, 10, folder=tmp_path)
    given = SMALL | {"pretrained": False, "align_epochs": 0}
    record = room.distil(["vl2v-adip"], name, "conv-s", DATA, given=given, out=tmp_path, say=lambda _: None)
    (row,) = record["rows"]
    assert row["teacher"] is None
    assert row["teacher_parameters"] is None
    assert row["high"] != row["high"]  # one seed has no interval


def test_time_is_taken_of_the_network_in_evaluation_mode() -> None:
    class Network(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert not self.training
            assert images.shape == (64, 3, 8, 8)
            return images.mean((2, 3))

    assert room.images_a_second(Network(), 8) > 0


def test_epochs_and_batch_are_settings_of_every_method(monkeypatch, capsys):
    import counterpoint.distilling
    from counterpoint import cli

    seen = {}
    monkeypatch.setattr(
        counterpoint.distilling, "distil", lambda *_, given, **__: seen.update(given) or {"rows": [], "runs": []}
    )
    words = (
        "distill --teacher run:t --student conv-s --data digits --method kd crd --epochs 3 --batch-size 64 --set lr=0.1"
    )
    assert cli.main(words.split()) == 0
    assert seen == {"epochs": 3, "batch_size": 64, "lr": 0.1}
