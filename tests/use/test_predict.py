"""Predicted classes: the three methods, files, formats, the page and the errors."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import counterpoint as cp
from counterpoint import data, training
from counterpoint.cli import main
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.tasks.measures import knn_accuracy, knn_votes
from counterpoint.use.predict import Prediction, Predictor, find_pictures, write_predictions

DIGITS = "digits?train=300"
PAIRS = "digit-captions?train=64"


def trained(slug: str, source: str, out: Path, **settings: Any) -> Path:
    config = Experiment.resolve(slug, source, overrides=settings).config
    return training.train(slug, config, data=source, out=out, name=slug, say=lambda _: None).path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained("finetune", DIGITS, tmp_path_factory.mktemp("runs"), encoder="conv-s", epochs=3, batch_size=32)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"image_encoder": "conv-s", "text_encoder": "text-s", "epochs": 1, "batch_size": 16, "embedding": 8}
    return trained("clip", PAIRS, tmp_path_factory.mktemp("runs"), **settings)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write six digits as files in two folders, with a file that is damaged and one that is no picture."""
    split = data.load(DIGITS).test
    for n in range(6):
        place = tmp_path / "photos" / ("a" if n < 3 else "b") / f"{n}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(split.images(np.array([n]))[0]).save(place)
    (tmp_path / "photos" / "b" / "damaged.png").write_bytes(b"x")
    (tmp_path / "photos" / "notes.txt").write_text("x")
    return tmp_path / "photos"


def test_a_classifier_gives_the_accuracy_of_its_evaluation(classifier: Path) -> None:
    predictor = Predictor.load(classifier, top=2)
    found = predictor.predict(predictor.asked(DIGITS))
    right = np.mean([one.true == one.label for one in found])
    assert right == pytest.approx(training.evaluate(classifier, say=lambda _: None)["accuracy"])
    assert all(len(one.others) == 1 and one.score >= next(iter(one.others.values())) for one in found)
    assert {one.item for one in found[:2]} == {"test 0", "test 1"}


def test_neighbours_vote_as_the_nearest_neighbour_accuracy_counts(classifier: Path) -> None:
    predictor = Predictor.load(classifier, method="neighbours", k=5)
    asked = predictor.asked(DIGITS)
    found = predictor.predict(asked)
    numbers = torch.tensor([predictor.classes.index(str(name)) for name in asked.true])
    z = predictor._embedded(asked.read(range(len(asked.names))))
    expected = knn_accuracy(predictor.rows, predictor.labels, z, numbers, k=5)
    assert np.mean([one.true == one.label for one in found]) == pytest.approx(expected, abs=2 / len(found))  # ties
    nearest = (z[0] @ predictor.rows.T).argmax()
    assert found[0].neighbours[0] == predictor.named[int(nearest)]
    assert all(name.startswith("train ") for name in found[0].neighbours)


def test_votes_are_weighted_by_the_cosine() -> None:
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    (votes,) = knn_votes(bank, labels, torch.tensor([[1.0, 0.0]]), 3, k=2, temperature=0.5)
    weight = float(np.exp(-1 / 0.5))
    assert votes.tolist() == pytest.approx([1 / (1 + weight), weight / (1 + weight), 0.0])


def test_prompts_give_the_class_whose_mean_text_is_nearest(pairs: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("zero\nseven\nfour\n", encoding="utf-8-sig")  # with the mark that editors on Windows write
    predictor = Predictor.load(pairs, classes=file, templates="a {}|the {}")
    assert predictor.classes == ["zero", "seven", "four"]
    source = data.load(PAIRS)
    pixels = source.test.column("image", np.arange(4))
    found = predictor.predict(list(pixels))
    encoder, text = predictor.encoder, predictor.encoder.transform.of_kind("text")[0]
    rows = [encoder.rows(text, [f"a {name}", f"the {name}"]).mean(0) for name in predictor.classes]
    cosines = encoder.rows(predictor.image, pixels) @ np.stack([row / np.linalg.norm(row) for row in rows]).T
    assert [one.label for one in found] == [predictor.classes[n] for n in cosines.argmax(1)]
    assert [one.score for one in found] == pytest.approx(cosines.max(1).tolist(), abs=1e-5)


def test_the_command_classifies_files_and_reports_the_others(
    classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, table = tmp_path / "found.html", tmp_path / "found.csv"
    assert main(["predict", str(classifier), str(photos), "-o", str(table), "--html", str(page)]) == 2
    out, err = capsys.readouterr()
    assert "6 pictures" in out
    assert "damaged.png" in err
    assert "left out 1 file that is no picture" in err
    rows = list(csv.DictReader(table.open()))
    assert [Path(row["item"]).name for row in rows] == [f"{n}.png" for n in range(6)]
    text = page.read_text(encoding="utf-8")
    assert "All pictures" in text  # few: each is shown once
    assert "Surest" not in text
    assert "damaged.png" in text
    assert main(["predict", str(classifier), str(photos / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "classifier"
    assert [one["label"] for one in found["predictions"]] == [row["label"] for row in rows[:3]]


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_each_format_keeps_classes_scores_and_neighbours(ending: str, tmp_path: Path) -> None:
    found = [Prediction("a, b.png", "cat", 0.5, {"dog": 0.25}, None, ("train 3", "train 1"))]
    file = write_predictions(found, tmp_path / f"found{ending}")
    if ending in (".json", ".jsonl"):
        (row,) = json.loads(file.read_text()) if ending == ".json" else map(json.loads, file.read_text().splitlines())
        assert row["others"] == {"dog": 0.25}
    else:
        (row,) = csv.DictReader(file.open()) if ending == ".csv" else pq.read_table(file).to_pylist()
        assert row["others"] == "dog 0.2500"
        assert row["neighbours"] == "train 3; train 1"
    assert (row["item"], row["label"], float(row["score"])) == ("a, b.png", "cat", 0.5)


def test_what_cannot_be_done_is_refused_by_name(classifier: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("cat\n")
    with pytest.raises(CounterpointError, match="encodes no texts"):
        Predictor.load(classifier, method="prompts")
    with pytest.raises(CounterpointError, match="no classifier; use --method neighbours"):
        Predictor.load(pairs, method="classifier")
    with pytest.raises(CounterpointError, match="at least two classes, got 1"):
        Predictor.load(pairs, classes=tmp_path / "one.txt")
    with pytest.raises(DataError, match="give a text file with a class name a line"):
        Predictor.load(pairs, classes=tmp_path / "none.txt")
    with pytest.raises(CounterpointError, match=r"must hold \{\} for the name"):
        Predictor.load(pairs, templates="a photo")
    with pytest.raises(CounterpointError, match="--bank gives neighbours, not the method classifier"):
        Predictor.load(classifier, bank="digits", method="classifier")
    with pytest.raises(CounterpointError, match="--templates are for the method prompts, not for classifier"):
        Predictor.load(classifier, templates="a {}")
    with pytest.raises(CounterpointError, match="unknown method 'magic'"):
        Predictor.load(classifier, method="magic")
    with pytest.raises(DataError, match=r"pictures of size 24, the run was trained on 32; add \?size=32"):
        Predictor.load(classifier).asked("digits?size=24")
    with pytest.raises(DataError, match="no such file or folder"):
        find_pictures([tmp_path / "nowhere"])
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "a.png").touch()
    with pytest.raises(DataError, match="no picture"):
        find_pictures([tmp_path])
    with pytest.raises(CounterpointError, match="no known ending"):
        write_predictions([], tmp_path / "found.xlsx")


def test_prompts_without_names_of_classes_ask_for_them(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(pairs, tmp_path / "run")
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps({name: fact for name, fact in facts.items() if name != "class_names"}))

    def of_another_task(*given: Any, **more: Any) -> None:
        raise CounterpointError("data source 'manifest' is for the task aligned")

    monkeypatch.setattr("counterpoint.use.predict.sources.load", of_another_task)
    with pytest.raises(CounterpointError, match="name no classes for prompts; name them with --classes FILE"):
        Predictor.load(run)


@pytest.mark.slow
def test_an_exported_classifier_gives_the_classes_of_predict(classifier: Path, photos: Path, tmp_path: Path) -> None:
    """The lines of its card are executed as they stand."""
    first = photos / "a" / "0.png"
    (wanted,) = Predictor.load(classifier).predict([first])
    (made,) = cp.load(classifier).export(tmp_path / "classes.pt2")
    assert made.difference < 1e-5
    card = (tmp_path / "classes.MODEL_CARD.md").read_text(encoding="utf-8")
    shutil.copy(first, tmp_path / "picture.png")
    code = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (wanted.label, "")
