"""Detect objects in files with a run of finetune-det."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import counterpoint as cp
from counterpoint import cli, data, training
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.use.objects import ObjectDetector

SETTINGS = {"encoder": "conv-s", "width": 32, "batch_size": 8, "epochs": 1, "evaluate_every": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = Experiment.resolve("finetune-det", "shapes?train=16&test=4", overrides=SETTINGS).config
    root = tmp_path_factory.mktemp("runs")
    return training.train(
        "finetune-det", config, data="shapes?train=16&test=4", out=root, name="boxes", say=lambda _: None
    ).path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = data.load("shapes?train=2&valid=2&test=4&size=64").test.images(np.arange(4))
    for n, picture in enumerate(pixels):
        Image.fromarray(picture[: 64 - 16 * (n % 2)]).save(folder / f"{n}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def test_boxes_are_in_pixels_of_the_files(run, photos):
    detector = ObjectDetector.load(run)
    files = sorted(photos.iterdir())
    found, faults = detector.detect(files, least=0.0)
    assert faults == [(str(photos / "bad.png"), "not a picture that can be read (unknown format)")]
    assert [one.height for one in found] == [64, 48, 64, 48]
    for one in found:
        assert one.objects
        scores = [of.score for of in one.objects]
        assert scores == sorted(scores, reverse=True)
        for of in one.objects:
            assert of.label in detector.learner.regions[1:]
            assert 0 <= of.left <= of.right <= 64
            assert 0 <= of.top <= of.bottom <= one.height
    assert max(of.right for one in found for of in one.objects) > 32  # not in those of the run's squares of 32
    assert all(not one.objects for one in detector.detect(files, least=1.0)[0])
    with pytest.raises(CounterpointError, match=r"0\.\.1"):
        detector.detect(files, least=2)


def test_command_writes_files_and_a_page(run, photos, tmp_path, capsys):
    words = ["predict", str(run), str(photos), "--least", "0.0"]
    for ending in ("csv", "json", "jsonl", "parquet"):
        assert cli.main([*words, "-o", str(tmp_path / f"found.{ending}"), "--html", str(tmp_path / "page.html")]) == 2
    shown = capsys.readouterr()
    assert "bad.png: not a picture that can be read" in shown.err
    assert "objects in 4 pictures" in shown.out + shown.err
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) > 0
    assert [float(row["left"]) for row in rows] == pytest.approx([line["left"] for line in lines])
    # The JSON file is a source of pictures with boxes again.
    content = json.loads((tmp_path / "found.json").read_text())
    assert len(content["annotations"]) == len(rows)
    again = data.load(f"coco:{tmp_path / 'found.json'}?size=32&images=/", task="dense")
    assert again.regions[1:] == ObjectDetector.load(run).learner.regions[1:]
    page = (tmp_path / "page.html").read_text()
    for part in ("Detected objects", "Not read", "0.png"):
        assert part in page


def test_its_encoder_embeds_and_is_exported(run, photos, tmp_path):
    files = sorted(photos.glob("[0-9].png"))
    rows = cp.load(run).encode(images=files)
    assert rows.shape == (4, 128)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert cli.main(["embed", str(run), "--out", str(tmp_path / "rows.parquet")]) == 0
    assert cli.main(["export", str(run), "--out", str(tmp_path / "encoder.pt2")]) == 0


def test_command_prints_json_and_refuses_options_of_classification(run, photos, capsys):
    (photos / "bad.png").unlink()
    assert cli.main(["predict", str(run), str(photos), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pictures"]) == 4
    assert cli.main(["predict", str(run), "--data", "shapes"]) == 2
    assert "counterpoint evaluate" in capsys.readouterr().err
    assert cli.main(["predict", str(run), str(photos), "--method", "neighbours"]) == 2
    assert "without --method" in capsys.readouterr().err
    assert cli.main(["predict", str(run), str(photos), "--top", "5"]) == 2
    assert "without --top" in capsys.readouterr().err


def test_other_files_of_a_folder_are_counted(run, photos, capsys):
    (photos / "bad.png").unlink()
    (photos / "notes.txt").write_text("no picture")
    assert cli.main(["predict", str(run), str(photos)]) == 0
    assert "left out 1 file that is no picture, such as" in capsys.readouterr().err


def test_file_and_page_of_one_name_are_refused(run, photos, tmp_path, capsys):
    words = ["-o", str(tmp_path / "found.csv"), "--html", str(tmp_path / "a" / ".." / "found.csv")]
    assert cli.main(["predict", str(run), str(photos), *words]) == 2
    assert "--out and --html both name" in capsys.readouterr().err
    assert not (tmp_path / "found.csv").exists()


def test_boxes_are_in_pixels_of_the_upright_picture(run, photos):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 60, 3), np.uint8)).save(photos / "turned.png", exif=exif)
    ((one,), _) = ObjectDetector.load(run).detect([photos / "turned.png"], least=0.0)
    assert (one.width, one.height) == (20, 60)
