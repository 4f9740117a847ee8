"""The guide for library users: its examples run one after another, as a reader would run them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint.use.export import NEEDS

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "library.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make own pictures with captions, as the guide expects them."""
    pytest.importorskip("pandas")
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    lines = ["image,caption"]
    for n in range(120):
        name, colour = list(colours.items())[n % 4]
        pixels = np.clip(np.array(colour) + rng.normal(0, 20, (24, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{n}.png")
        lines.append(f"photos/{n}.png,a {name} thing {n}")
    (tmp_path / "items.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_examples_run_in_their_order(folder, capsys):
    names: dict = {"__name__": "guide"}
    for code in blocks():
        if ".onnx" in code and not all(map(importlib.util.find_spec, NEEDS)):
            code = code.replace(".onnx", ".pt2")  # the same without the extra
        exec(compile(code, str(GUIDE), "exec"), names)
    run, z, hits = names["run"], names["z"], names["hits"]
    assert run.path == Path("runs/mine")
    assert z.shape == (2, run.config.embedding)
    assert names["both"]["caption"].shape == (2, run.config.embedding)
    assert hits[0].files["image"].startswith(str(folder / "photos"))
    assert len([*folder.glob("encoder.*.onnx"), *folder.glob("encoder.*.pt2")]) == 2
    assert (folder / "encoder.MODEL_CARD.md").is_file()
    assert (folder / "encoder.json").is_file()
    assert names["features"].shape == (2, 512)
    np.testing.assert_array_equal(names["again"].encode(images=["photos/0.png"]), run.encode(images=["photos/0.png"]))
    assert set(names["result"].means) == {"simclr", "dcl"}
    assert "clip" in capsys.readouterr().out


def test_every_name_of_the_face_is_in_the_guide():
    import counterpoint as cp

    text = GUIDE.read_text(encoding="utf-8")
    unnamed = {"CounterpointError", "Trained", "data"}
    assert [name for name in cp.__all__ if name not in unnamed and f"cp.{name}" not in text] == []
