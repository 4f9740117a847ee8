"""A missing file is named before the run is loaded, which takes seconds. The runs here have no weights, so loading them fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from counterpoint import cli
from counterpoint.engine.run import WEIGHTS, Run
from counterpoint.experiment import Experiment

RUNS = {
    "macil-sd": "async-bags",
    "clip": "digit-captions",
    "finetune": "digits",
    "lol": "shape-questions",
    "supcon-t2i": "shapes",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a run of each system, without weights, and with a picture and a full folder."""
    monkeypatch.chdir(tmp_path)
    for slug in RUNS:
        Run.create(tmp_path, Experiment.resolve(slug, None, check=False).record(0), slug)
    for slug in ("clip", "finetune"):
        (tmp_path / slug / WEIGHTS).touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "emb.parquet").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("detect gone.mp4 gone/ --run macil-sd", "gone.mp4: no such file or folder"),
        ("detect gone.mp4 --run macil-sd --json", "gone.mp4: no such file or folder"),
        ("calibrate macil-sd --data videos:gone", "gone: no such file or folder"),
        ("search clip gone.png --in emb.parquet", "gone.png: no such file or folder"),
        ("search clip image=gone.png --in emb.parquet", "gone.png: no such file or folder"),
        ("predict finetune gone.png", "gone.png: no such file or folder"),
        ("predict clip a.png --classes gone.txt", "gone.txt: no such file or folder"),
        ("ask lol what? --image gone.png", "gone.png: no such file or folder"),
        ("ask lol what? --out full", "full exists and is not an empty folder"),
        ("ask lol what? --html a.png/page.html", "a.png/page.html cannot be written"),
        ("generate supcon-t2i --prompt circle --out new --subject gone", "gone: no such file or folder"),
        ("embed clip -o new.parquet --data manifest:gone.csv", "gone.csv"),
        ("export clip -o a.png/clip.onnx", "a.png is a file"),
    ],
)
def test_a_missing_path_is_named_before_the_run_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert WEIGHTS not in error


def test_words_that_are_no_paths_are_not_looked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "clip", "a red circle", "--in", "emb.parquet"]) == 2
    assert "no such file" not in capsys.readouterr().err
