"""Base and novel classes, unseen domains, texts of classes, runs as teachers of pictures and texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from counterpoint.data.styled_shapes import load
from counterpoint.errors import CounterpointError, DataError, RunError
from counterpoint.experiment import Experiment
from counterpoint.tasks.class_teachers import (
    AlignedDual,
    Table,
    check_class_teacher,
    need_apart,
    open_network,
    teacher_width,
)
from counterpoint.tasks.class_texts import names_of, templates_of, texts_of
from counterpoint.tasks.kept_classes import class_shares
from counterpoint.tasks.labelled import LabelledTask
from counterpoint.tasks.open_classes import OpenConfig, OpenEvaluator, class_shots, harmonic_mean
from embedded import embeddings

CLASSES = ("a", "b", "c", "d")
CLIP = (
    "fit:clip?data=styled-shapes%3Ftrain=16%26valid=8%26test=8&image_encoder=conv-s&embedding=8&recipe=none&epochs=1"
    "&batch_size=8"
)


def test_base_pictures_are_judged_among_base_classes_and_novel_ones_among_novel_ones() -> None:
    evaluator = OpenEvaluator(OpenConfig(base=0.5), CLASSES)
    labels = torch.tensor([0, 1, 2, 3])
    logits = torch.tensor([[1.0, 0, 9, 0], [1, 0, 0, 0], [9, 0, 1, 0], [9, 0, 0, 1]])
    found = {name: value for name, (value, _) in evaluator.classified(labels, logits).items()}
    assert found["accuracy"] == 0.0
    assert found["base_accuracy"] == 0.5
    assert found["novel_accuracy"] == 1.0
    assert found["harmonic_mean"] == pytest.approx(2 / 3)


def test_without_novel_classes_only_the_usual_figures_remain() -> None:
    found = OpenEvaluator(OpenConfig(), CLASSES).classified(torch.tensor([0, 1]), torch.eye(4)[:2])
    assert found.keys() == {"accuracy", "macro_recall"}


def test_pictures_of_novel_classes_do_not_train_unless_the_system_is_transductive() -> None:
    data = load(train=64, test=8, label="shape")
    config = OpenConfig(base=0.5, batch_size=8)
    labels = data.train.labels
    assert labels is not None
    assert (labels[LabelledTask(data, config).rows] < 4).all()

    class Transductive(OpenConfig):
        transductive = True

    assert len(LabelledTask(data, Transductive(base=0.5, batch_size=8)).rows) == 64


@pytest.mark.parametrize(("base", "classes", "expected"), [(1.0, 4, 4), (0.5, 5, 3), (0.5, 4, 2)])
def test_half_of_the_classes_is_rounded_up(base: float, classes: int, expected: int) -> None:
    assert OpenConfig(base=base).base_classes(classes) == expected


def test_one_novel_class_decides_nothing_and_is_refused() -> None:
    with pytest.raises(CounterpointError, match="leaves 3 base and 1 novel classes"):
        OpenConfig(base=0.7).base_classes(4)


def test_the_harmonic_mean_of_zeros_is_zero() -> None:
    assert harmonic_mean(0.0, 0.0) == 0.0


def test_shots_are_chosen_by_the_seed_for_each_class() -> None:
    labels = np.array([0, 0, 0, 1, 1, -1, 2])
    found = class_shots(labels, 2, 0)
    assert np.bincount(labels[found]).tolist() == [2, 2, 1]
    assert not np.array_equal(class_shots(np.zeros(50, int), 5, 0), class_shots(np.zeros(50, int), 5, 1))
    assert len(class_shots(labels, 0, 0)) == 6
    assert len(class_shots(np.array([-1, -1]), 2, 0)) == 0


# --- texts


def test_texts_fill_templates_with_names_and_append_descriptions(tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text(json.dumps({"polar_bear": "white fur", "cat": "whiskers"}))
    found = texts_of(["polar_bear", "cat"], "a {}|the {}", descriptions=str(tmp_path / "more.json"))
    assert found == [
        ["a polar bear . white fur", "the polar bear . white fur"],
        ["a cat . whiskers", "the cat . whiskers"],
    ]


def test_templates_and_names_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a photo of a {}\n\na sketch of a {}\n")
    assert templates_of(str(tmp_path / "t.txt")) == ["a photo of a {}", "a sketch of a {}"]
    (tmp_path / "n.txt").write_text("one\ntwo\n")
    assert names_of(["n01", "n02"], str(tmp_path / "n.txt")) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("one\n", "txt", "has 1 line for 2 classes"),
        ("one\none\n", "txt", "two classes have the same name 'one'"),
        ('{"a": "x"}', "json", "has no name of 1 class, such as 'b'"),
        ("{", "json", "no JSON"),
    ],
)
def test_names_that_are_missing_or_doubled_are_refused(tmp_path: Path, text: str, suffix: str, message: str) -> None:
    file = tmp_path / f"names.{suffix}"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        names_of(["a", "b"], str(file))


def test_doubled_names_of_the_data_are_refused() -> None:
    with pytest.raises(DataError, match="two classes have the same name 'polar bear'"):
        names_of(["polar_bear", "polar bear"])


# --- teachers


def test_a_small_clip_teaches_with_its_own_texts_and_scale() -> None:
    assert teacher_width(CLIP) == 8
    network = open_network(CLIP)
    assert isinstance(network, AlignedDual)
    rows = network.texts(["a photo of a red disc"] * 2)
    assert rows.shape == (2, 8)
    assert torch.equal(rows[0], rows[1])
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.images(pictures), network.learner.projected("image", pictures))
    assert network.scale == pytest.approx(float(network.learner.log_scale.exp()))
    with pytest.raises(CounterpointError, match="1 text is longer"):
        network.texts(["a photo of " + "a red disc and " * 20])


def test_a_run_without_texts_is_no_teacher() -> None:
    with pytest.raises(CounterpointError, match="does not embed pictures and texts"):
        teacher_width("fit:simclr?data=digits")
    with pytest.raises(RunError):
        open_network("run:/no/such/run")


@pytest.mark.parametrize("name", ["", "hf:", "clip", "http:x"])
def test_names_of_no_kind_are_refused(name: str) -> None:
    with pytest.raises(CounterpointError, match="teacher of pictures and texts"):
        check_class_teacher(name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scale": np.nan}, "scale must be one number > 0, got nan"),
        ({"scale": -1.0}, "scale must be one number > 0, got -1"),
        ({"scale": np.ones(2)}, "scale must be one number > 0"),
        ({"train": np.array(["a", "b"])}, "arrays of numbers"),
        ({"train": np.zeros((2, 6))}, "train has 2 rows of zeros, NaN or infinity, the first is row 0"),
        ({"text": np.eye(4, 6)[[0, 1, 2]][:, None] * [[1.0], [0.0]]}, "text has 3 rows of zeros"),
        (
            {"classes": np.array(list("abca"))},
            "classes must name each of the 4 texts once, got 4 names of which 3 differ",
        ),
        ({"classes": np.array(list("abc"))}, "classes must name each of the 4 texts once, got 3 names"),
    ],
)
def test_a_file_of_embeddings_with_a_fault_is_refused(tmp_path: Path, more: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Table.read(embeddings(2, 4, folder=tmp_path, **more))


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    whole = Path(embeddings(2, 4, folder=tmp_path).removeprefix("file:"))
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:100])
    np.save(tmp_path / "one.npy", np.ones((2, 6)))
    for name in ("cut.npz", "one.npy", "none.npz"):
        with pytest.raises(DataError, match=r"cannot be read as \.npz"):
            Table.read(f"file:{tmp_path / name}")


def test_two_classes_with_the_same_embedding_are_refused() -> None:
    rows = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    need_apart(rows, "abcde", "hf:x")
    rows[3] = rows[1]
    with pytest.raises(CounterpointError, match=r"hf:x gives '[bd]' and '[bd]' the same embedding"):
        need_apart(rows, "abcde", "hf:x")


def test_class_shares_are_among_the_classes_of_their_half() -> None:
    logits = torch.tensor([[1.0, 0, 9, 0], [1, 0, 0, 0], [9, 0, 1, 0], [9, 0, 0, 1], [0, 0, 0, 1]])
    found = class_shares(logits, torch.tensor([0, 1, 2, 2, 2]), 2)
    torch.testing.assert_close(found, torch.tensor([1.0, 0, 1 / 3, torch.nan]), equal_nan=True)


# --- the world


def test_unseen_styles_are_left_out_and_measured_apart() -> None:
    data = load(train=64, test=32, unseen="outline-bright")
    assert set(np.unique(data.train.domains)) == {0, 2}
    assert set(np.unique(data.shifts["unseen"].domains)) == {1, 3}
    assert len(data.shifts["unseen"]) == 32
    facts = Experiment.resolve("kd", "styled-shapes", recipe=False, check=False).measured(data)
    parts = [batch["part"] for batch in facts.evaluation_loader("test")]
    assert parts == ["test", "unseen"]
    assert [batch["part"] for batch in facts.evaluation_loader("valid")] == ["test"]


def test_captions_name_style_colour_and_shape_of_their_picture() -> None:
    pairs, pictures = load(task="aligned", train=64, test=8, drop=0.0), load(train=64, test=8)
    for n, text in enumerate(pairs.train.column("text", np.arange(64))):
        assert text.endswith(pictures.classes[pictures.train.labels[n]])
        assert np.array_equal(pairs.train.column("image", np.array([n])), pictures.train.images(np.array([n])))


def test_shapes_train_and_colours_are_novel_in_shape_colour() -> None:
    data = load(train=64, test=64, label="shape-colour")
    assert data.train.labels.max() == 7
    assert np.bincount(data.test.labels >= 8).tolist() == [32, 32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"styles": "cubist"}, "style of styled-shapes"),
        ({"unseen": "plain-outline-striped-bright"}, "leaves no style"),
        ({"label": "size"}, "label of styled-shapes"),
        ({"drop": 2.0}, "drop in 0..1"),
        ({"train": 1}, "train and test of at least 2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(CounterpointError, match=message):
        load(**options)


def test_several_templates_and_a_file_of_names_make_one_prompt_of_each_class(tmp_path: Path) -> None:
    from counterpoint.core.class_texts import class_prototypes
    from counterpoint.tasks.aligned import TASK, AlignedConfig

    (tmp_path / "names.txt").write_text("".join(f"number {n}\n" for n in range(8)))
    data = load(task="aligned", train=16, test=8, label="shape")
    config = AlignedConfig(
        batch_size=8, image_encoder="conv-s", prompt="a {}|the {}", class_names=str(tmp_path / "names.txt")
    )
    task = TASK(data, config)
    (batch,) = [batch for batch in task.evaluation_loader("test") if batch["part"] == "prompts"]
    ids, mask = batch["inputs"]["text"]
    assert [task.tokenizers["text"].decode(row[own].tolist()).strip() for row, own in zip(ids[:3], mask[:3], strict=True)] == [
        "a number 0", "the number 0", "a number 1",
    ]  # fmt: skip
    evaluator = task.evaluator("test")
    rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    evaluator.update(batch, {"embedding": {"text": rows}})
    torch.testing.assert_close(evaluator.prompts[""]["text"], class_prototypes(rows.view(8, 2, 4)))
