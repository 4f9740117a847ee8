"""The built-in detector: what the package holds, that it works without a run, and that every output says what it is."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from counterpoint import cli
from counterpoint.core.weights import read_weights
from counterpoint.data.media import write_video
from counterpoint.use import live
from counterpoint.use.built_in import FOLDER, built_in, card, is_built_in
from counterpoint.use.detect import Detector

SAID = "trained on drawn arcade clips, not validated on real footage"


@pytest.fixture(scope="module")
def detector():
    return Detector(built_in())


def test_the_package_holds_small_weights_with_a_card(detector):
    files = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert set(files) == {"config.yaml", "facts.json", "model.safetensors", "calibration.json", "card.json"}
    assert sum(files.values()) < 20e6
    assert read_weights(FOLDER / "model.safetensors", "macil-sd")
    found = card()
    assert found["licence"] == "Apache-2.0"
    assert all(found["trained_on"]["photographs"].values())  # a licence each
    assert not set(found["trained_on"]["photographs"]) & set(found["measured_on"]["photographs"])
    assert found["threshold"] == round(detector.threshold, 4)
    assert is_built_in(detector.run)


def test_it_finds_violence_in_a_clip_that_it_has_not_seen(detector, tmp_path):
    from counterpoint.data import arcade

    script = next(c for c in (arcade.script("test", i, seed=7) for i in range(100)) if c.label and c.snippets < 30)
    arcade.write_clip(script, tmp_path / "clip.mp4")
    found = detector.detect(tmp_path / "clip.mp4", truth=arcade.spans(script))
    precision, chance = found.precision()
    assert precision > 1.5 * chance
    assert found.raw is not None


def test_every_output_says_what_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_video("film.mp4", [np.full((64, 96, 3), 3 * n, np.uint8) for n in range(64)], None)
    words = ["detect", "film.mp4", "--threshold", "0.0001", "--out", "found"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert SAID in said.out
    assert "is not validated on real footage" in said.err
    (folder,) = (tmp_path / "found" / "videos").iterdir()
    texts = [*(folder / f"moments.{form}" for form in ("vtt", "edl", "otio")), folder / "detection.json"]
    texts += [tmp_path / "found" / name for name in ("detection.html", "detections.json", "videos.csv", "moments.csv")]
    for file in texts:
        assert SAID.lower() in file.read_text().lower(), file
    assert cli.main([*words[:4], "--json"]) == 0
    assert SAID in json.loads(capsys.readouterr().out)["run"]


def test_alarms_say_what_it_is(detector, tmp_path):
    write_video(tmp_path / "a.mp4", [np.full((64, 96, 3), 3 * n, np.uint8) for n in range(32)], None)
    lines = live.Lines(io.StringIO(), detector, 1e-6)
    live.follow(detector, tmp_path / "a.mp4", lines, say=lambda _: None)
    assert all(SAID in json.loads(line)["run"] for line in lines.file.getvalue().splitlines())
    assert lines.count == 1


def test_it_has_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_video("a.mp4", [np.full((64, 96, 3), 9, np.uint8)] * 32, None)
    assert cli.main(["detect", "a.mp4", "--run", "arcade-small"]) == 0
    assert SAID in capsys.readouterr().out


def test_the_guide_has_the_card_s_figures():
    text = (Path(__file__).parents[2] / "docs/guides/detection.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    figures = card()["figures"]
    told = {
        "arcade": "100 arcade clips |",
        "over held-out photographs": "over other photographs",
        "calm, held-out photographs and voices": "calm clips",
        "recorded boom": "a blast",
        "recorded punch": "a punch",
        "recorded car_door": "a car door",
        "recorded whiff": "a whoosh",
        "recorded house_lo": "house music",
    }
    assert set(told) == set(figures)
    for name, words in told.items():
        (row,) = (line for line in rows if words in line)
        assert all(str(value) in row for key, value in figures[name].items() if key != "clips" or "calm" not in name), (
            row
        )
    assert f"Its threshold, {card()['threshold']}," in text
