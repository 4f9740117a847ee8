"""A project folder for the tests of the local page: a trained run, copies of it, embeddings, a claim and a detection."""

from __future__ import annotations

import json
import os
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")

from starlette.testclient import TestClient

from counterpoint import cli, search
from counterpoint.serve.app import application, site_of
from counterpoint.serve.guard import Guard

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 200)}
BASE = "http://127.0.0.1:8377"
TRAIN = ["--epochs", "3", "--batch-size", "8", "--image-encoder", "conv-s", "--embedding", "8", "--evaluate-every", "3"]


def detection(video: str) -> dict:
    """Make what `counterpoint detect --json` prints for one video with three moments."""
    score = [0.1, 0.9, 0.8, 0.1, 0.1, 0.7, 0.1, 0.1, 0.1, 0.95]
    intervals = [(0.5, 1.5, 0.75, 0.9), (2.5, 3.0, 2.75, 0.7), (4.5, 5.0, 4.75, 0.95)]
    return {
        "video": video,
        "duration": 5.0,
        "width": 64,
        "height": 48,
        "has_audio": True,
        "threshold": 0.5,
        "intervals": [dict(zip(("start", "end", "peak", "score"), i, strict=True)) for i in intervals],
        "snippet_seconds": 0.5,
        **dict.fromkeys(("score", "audio", "visual"), score),
        "average_precision": None,
        "chance": None,
        "notes": ["a note"],
        "speed": 20.0,
    }


def wav(file: Path, pitch: float) -> None:
    """Write a short tone."""
    tone = np.sin(2 * np.pi * pitch * np.arange(4000) / 8000)
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes((tone * 20000).astype("<i2").tobytes())


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make the folder once; tests that write use `copied`."""
    outer = tmp_path_factory.mktemp("serve")
    folder = outer / "project"
    before, home = torch.get_num_threads(), os.environ.get("COUNTERPOINT_CACHE")
    torch.set_num_threads(1)
    os.environ["COUNTERPOINT_CACHE"] = str(outer / "cache")
    rng = np.random.default_rng(0)
    lines = ["image,caption,sound,label,split"]
    for number, (colour, value) in enumerate(COLOURS.items()):
        (folder / "items").mkdir(parents=True, exist_ok=True)
        for n in range(8):
            pixels = np.clip(np.array(value) + rng.normal(0, 12, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "items" / f"{colour}{n}.png")
            wav(folder / "items" / f"{colour}{n}.wav", 300.0 * (number + 1) + 5 * n)
            row = (f"items/{colour}{n}.png", f"a {colour} picture {n}", f"items/{colour}{n}.wav", colour)
            lines.append(",".join((*row, "test" if n < 2 else "train")))
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    spec = f"manifest:{folder}/table.csv?size=16"
    out = folder / "runs"
    assert cli.main(["train", "clip", "--data", spec, *TRAIN, "--out", str(out), "--name", "first"]) == 0
    search.embed(out / "first", folder / "items.parquet")
    for name, change in {"second": {"lr": 0.2}, "third": {"epochs": 9}}.items():
        shutil.copytree(out / "first", out / name)
        config = yaml.safe_load((out / name / "config.yaml").read_text())
        config["config"] |= change
        (out / name / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = (out / "second" / "metrics.csv").read_text().splitlines()
    (out / "second" / "metrics.csv").write_text("\n".join(rows[:3]) + "\n")
    (out / "second" / "model.safetensors").unlink()
    os.utime(out / "second", (1e9, 1e9))
    (folder / "results" / "claims").mkdir(parents=True)
    shutil.copy(ROOT / "results" / "claims" / "albef.json", folder / "results" / "claims")
    (folder / "film.webm").write_bytes(bytes(range(256)) * 8)
    made = {
        "run": "runs/macil",
        "warnings": ["a warning"],
        "videos": [detection("film.webm"), detection("/gone/x.avi")],
    }
    (folder / "film.json").write_text(json.dumps(made))
    # Outside: what no request may reach.
    shutil.copytree(out / "first", outer / "outside")
    (outer / "secret.txt").write_text("secret")
    (outer / "secret.json").write_text(json.dumps(made))
    (out / "leaving").symlink_to(outer / "outside")
    (folder / "leaving.json").symlink_to(outer / "secret.json")
    yield folder
    torch.set_num_threads(before)
    if home is None:
        del os.environ["COUNTERPOINT_CACHE"]
    else:
        os.environ["COUNTERPOINT_CACHE"] = home


def served(folder: Path, guard: Guard | None = None) -> SimpleNamespace:
    """Return the site of a folder, a browser of it, and its form's token."""
    site = site_of([folder], guard or Guard())
    browser = TestClient(application(site), base_url=BASE, follow_redirects=False)
    return SimpleNamespace(site=site, get=browser.get, post=browser.post, browser=browser, form=site.guard.form_token)


@pytest.fixture(scope="module")
def page(project: Path) -> SimpleNamespace:
    return served(project)


@pytest.fixture
def copied(project: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder that a test may change. Its embeddings name the run of the first folder."""
    return Path(shutil.copytree(project, tmp_path / "project", symlinks=True))
