"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from counterpoint import catalog
from counterpoint.files import patient_threads
from counterpoint.report import figures

patient_threads()  # before any test module imports torch
gc.disable()  # until all imports are done

DRAWN = figures.svg, figures._axes

if not Path("/proc/driver/nvidia").exists():
    # Without a GPU, Triton's interpreter runs the kernels. It must know so before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

# A new process takes seconds for its imports. A test's processes are copies of one server, which makes the imports once.
multiprocessing.set_forkserver_preload(
    [
        "torch.distributed",
        "timm",
        "sklearn.linear_model",
        "sklearn.cluster",
        "counterpoint.training",
        "counterpoint.report.run",
        *sorted({row.module.partition(":")[0] for row in catalog.entries().values() if row.built}),
    ]
)


def pytest_collection_finish() -> None:
    """Keep the million objects of the imports out of garbage collection, and collect less often."""
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


VIDEOS = {  # name -> snippets; one name is the beginning of another, and two are not ASCII
    "train": {
        "v=abc__#1_label_B1-0-0": 12,
        "v=abc__#1_label_B1-0-0-x": 7,
        "Amélie.2001__#00-01-00_00-02-00_label_B2-G-0": 30,
        "v=quiet__#1_label_A": 9,
        "影.2018__#1_label_A": 14,
    },
    "test": {
        "v=def__#1_label_G-0-0": 10,
        "v=def__#1_label_G-0-0-2": 6,
        "v=calm__#1_label_A": 8,
    },
}
ANNOTATIONS = {"v=def__#1_label_G-0-0": [(10, 40), (100, 130)], "v=def__#1_label_G-0-0-2": [(0, 96)]}


class XDTree(NamedTuple):
    root: Path
    videos: dict[str, dict[str, int]]
    annotations: dict[str, list[tuple[int, int]]]

    def visual(self, split: str, name: str, crop: int) -> Path:
        return self.root / ("RGB" if split == "train" else "RGBTest") / f"{name}__{crop}.npy"

    def audio(self, split: str, name: str) -> Path:
        return self.root / "vggish-features" / split / f"{name}__vggish.npy"


@pytest.fixture
def xd_tree(tmp_path: Path) -> XDTree:
    """Make a small directory in XD-Violence's layout, with lists whose paths are another machine's."""
    tree = XDTree(tmp_path / "xd", VIDEOS, ANNOTATIONS)
    rng = np.random.default_rng(0)
    truth = []
    for split, videos in VIDEOS.items():
        rgb, audio = [], []
        folder = "RGB" if split == "train" else "RGBTest"
        for name, length in videos.items():
            for crop in range(5):
                path = tree.visual(split, name, crop)
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, rng.random((length, 1024), np.float32))
                rgb.append(f"/home/someone/xd/{folder}/{path.name}")
            path = tree.audio(split, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, rng.random((length, 128), np.float32))
            audio.append(f"/home/someone/xd/vggish-features/{split}/{path.name}")
            if split == "test":
                part = np.zeros(16 * length)
                for start, end in ANNOTATIONS.get(name, []):
                    part[start:end] = 1
                truth.append(part)
        suffix = "" if split == "train" else "_test"
        (tree.root / f"rgb{suffix}.list").write_text("\n".join(rgb) + "\n", encoding="utf-8")
        (tree.root / f"audio{suffix}.list").write_text("\n".join(audio) + "\n", encoding="utf-8")
    np.save(tree.root / "gt.npy", np.concatenate(truth))
    return tree


@pytest.fixture(scope="session")
def run_of_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of MACIL-SD that knows its backbones: a little training on a few arcade clips."""
    if importlib.util.find_spec("arcade") is None:
        pytest.skip("needs the sprites of the package arcade: pip install --no-deps arcade")
    from dataclasses import replace

    from counterpoint import training

    folder = tmp_path_factory.mktemp("clips")
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the clips: each would draw them for seconds
        shared = tmp_path_factory.getbasetemp().parent / "clips"
        shared.mkdir(exist_ok=True)
        (folder / "cache").symlink_to(shared, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTERPOINT_CACHE", str(folder / "cache"))
        config = replace(training.default_config("macil-sd", "arcade"), epochs=3, batch_size=8)
        spec = "arcade?train=16&test=4"
        run = training.train("macil-sd", config, data=spec, out=folder / "runs", name="clips", say=lambda _: None)
    return run.path


class Undrawn:
    """Axes without a drawing. What would be plotted must still have as many y as x."""

    def plot(self, x: Any, y: Any, *_: Any, **__: Any) -> None:
        assert len(x) == len(y)

    def set_ticks(self, places: Any, labels: Any, **_: Any) -> None:
        assert len(places) == len(labels)

    set_xticks = set_yticks = set_ticks

    def __getattr__(self, name: str) -> Undrawn:
        return self

    def __getitem__(self, name: str) -> Undrawn:
        return self

    def __call__(self, *_: Any, **__: Any) -> Undrawn:
        return self


@pytest.fixture(scope="session", autouse=True)
def undrawn() -> Iterator[None]:
    """Leave the drawings out of the pages, but for their text alternatives.

    Matplotlib takes longer for them than a test takes to train. A test of a system's own picture asks for `drawn`, a test of
    pages for `all_drawn`.
    """
    with without_drawings():
        yield


@contextmanager
def without_drawings() -> Iterator[None]:
    from markupsafe import Markup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "svg", lambda figure, alt: Markup('<svg role="img" aria-label="{}"></svg>').format(alt))
        patch.setattr(figures, "_axes", lambda width, height: (None, Undrawn()))
        yield


@pytest.fixture
def all_drawn() -> Iterator[None]:
    """Draw all that the pages of this test show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "svg", DRAWN[0])
        patch.setattr(figures, "_axes", DRAWN[1])
        yield


@pytest.fixture
def drawn(all_drawn: None) -> Iterator[None]:
    """Draw what the pages of this test show, but for the curves of the metrics, which every run has."""
    from counterpoint.report import run

    whole = run.curve_sections

    def undrawn_curves(rows: Any) -> Any:
        with without_drawings():
            return whole(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "curve_sections", undrawn_curves)
        yield


@pytest.fixture
def undivided(monkeypatch):
    """Leave the user's own training rows together, but for ?valid=, in tests of how rows are read (see test_valid.py)."""
    from counterpoint.data.own import splits

    carved = splits._carved

    def unless_asked(reader, train, needed, labels, share):
        return (train, train[:0], []) if share is None else carved(reader, train, needed, labels, share)

    monkeypatch.setattr(splits, "_carved", unless_asked)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the GPU's kernels take every size and do nothing: fake tensors have no values."""
    from counterpoint.core import chunks

    triton_kernels = pytest.importorskip("counterpoint.core.triton_kernels", reason="needs Triton")

    class Nothing:
        def __getitem__(self, grid: Any) -> Any:
            return lambda **_: None

    for name in ("sums", "pull", "cross_sums", "cross_pull"):
        monkeypatch.setattr(triton_kernels, name, Nothing())
    monkeypatch.setattr(chunks, "SMALL", 0)
    monkeypatch.setattr(chunks, "keep_default", lambda x: 0)
