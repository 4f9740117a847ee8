"""`arcade`: audio-visual game clips, violent or not, with the truth of every frame known and sound that often lags.

A clip is a scene of the world of sprites (`data/worlds/sprites/`); its `scenes.py` describes the events of a scene.
Explosions, hits, hurts and lasers are violent. Half of the events sound late. Some are off-screen (heard only) or silent (seen
only), as in Figure 1a of MACIL-SD. A frame is violent while a violent event is seen or heard.

Pictures and sounds come from the PyPI package `arcade` (see `data/worlds/sprites/artwork.py`); the music is synthesised. The
splits share sprites and sounds, but no clips: a model with high scores here has learned these sprites.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data import cached
from counterpoint.data.bags import Bag, BagData, TestVideo
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds.sprites.artwork import assets
from counterpoint.data.worlds.sprites.drawing import Drawing
from counterpoint.data.worlds.sprites.scenes import (
    FPS,
    FRAMES,
    HEIGHT,
    RATE,
    SNIPPET,
    VERSION,
    WIDTH,
    Scene,
    scene,
    spans,
    truth,
)
from counterpoint.data.worlds.sprites.sounds import render_audio
from counterpoint.data.worlds.workers import in_processes
from counterpoint.waiting import patient_track

SPLITS = ("train", "test", "valid")  # a clip's scene depends on the position of its split here


def script(split: str, index: int, seed: int = 0) -> Scene:
    """Draw the scene of clip number `index` of a split; `seed` is the seed of the set."""
    return scene((VERSION, seed, SPLITS.index(split), index), f"{split}-{index:04d}")


def write_clip(clip: Scene, path: Path | str, *, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Write a clip as a video file with a sound track (H.264 and AAC in .mp4)."""
    from counterpoint.data.media import write_video

    drawing = Drawing(clip, size)
    frames = (drawing.draw(n / FPS) for n in range(clip.snippets * FRAMES))
    write_video(path, frames, render_audio(clip), fps=FPS, sample_rate=RATE)


def export(
    directory: Path | str, *, split: str = "test", count: int, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> list[Path]:
    """Write the first `count` clips of a split as .mp4, in the layout that the source `videos:DIR` reads.

    Files are DIR/SPLIT/{violent,normal}/NAME.mp4 and, for the test split, DIR/truth.csv (video, start, end; seconds).

    Args:
        directory: DIR; it is made where it is missing.
        split: train, valid or test.
        count: number of clips.
        seed: seed of the set.
        size: width and height in pixels.

    Returns the video files in order.
    """
    import csv

    directory = Path(directory)
    paths, rows = [], []
    for index in patient_track(range(count), "writing clips"):
        clip = script(split, index, seed)
        path = directory / split / ("violent" if clip.label else "normal") / f"{clip.name}.mp4"
        write_clip(clip, path, size=size)
        paths.append(path)
        rows += [(path.name, f"{start:.3f}", f"{end:.3f}") for start, end in spans(clip)]
    if split == "test":
        with (directory / "truth.csv").open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(("video", "start", "end"))
            out.writerows(rows)
    return paths


# --- features ---------------------------------------------------------------------------------------------------------

Row = tuple[str, int, NDArray[np.float32], NDArray[np.float32], NDArray[np.int8]]  # name, label, visual, audio, truth


def features(split: str, index: int, seed: int, visual: dict[str, Any], audio: dict[str, Any]) -> Row:
    """Return a clip's feature rows, computed from the pictures and the sound of its video file (which is not written)."""
    import torch

    torch.set_num_threads(1)
    eye, ear = _backbones(json.dumps(visual), json.dumps(audio))
    from counterpoint.data.media import sample_times

    clip = script(split, index, seed)
    drawing = Drawing(clip, (WIDTH, HEIGHT))
    times = sample_times(clip.snippets, eye.frames_per_snippet, SNIPPET)
    shown = np.floor(times * FPS) / FPS  # the frame of the file that is shown at that time
    frames = np.stack([_scaled(drawing.draw(float(time)), eye.frame_size) for time in shown])
    frames = frames.reshape(clip.snippets, eye.frames_per_snippet, *frames.shape[1:])
    length = round(ear.window_seconds * RATE)
    wave = np.concatenate([np.zeros(length, np.float32), render_audio(clip)])
    stops = length + np.rint((np.arange(clip.snippets) + 1) * SNIPPET * RATE).astype(int)
    windows = np.stack([wave[stop - length : stop] for stop in stops])
    if ear.sample_rate != RATE:
        from scipy.signal import resample

        windows = np.asarray(resample(windows, round(ear.window_seconds * ear.sample_rate), axis=1), np.float32)
    return clip.name, clip.label, eye(frames), ear(windows), truth(clip)


@lru_cache(maxsize=2)
def _backbones(visual: str, audio: str) -> tuple[Any, Any]:
    from counterpoint import encoders

    return encoders.build_visual(json.loads(visual)), encoders.build_audio(json.loads(audio))


def _scaled(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


@overload
def load(
    argument: str | None = ...,
    *,
    task: Literal["bags"] = ...,
    train: int = ...,
    valid: int = ...,
    test: int = ...,
    seed: int = ...,
    visual: str = ...,
    audio: str = ...,
) -> BagData: ...
@overload
def load(
    argument: str | None = ...,
    *,
    task: str,
    train: int = ...,
    valid: int = ...,
    test: int = ...,
    seed: int = ...,
    visual: str = ...,
    audio: str = ...,
) -> BagData | AlignedData: ...
def load(
    argument: str | None = None,
    *,
    task: str = "bags",
    train: int = 320,
    valid: int = -1,
    test: int = 200,
    seed: int = 0,
    visual: str = "light",
    audio: str = "logmel",
) -> BagData | AlignedData:
    """Return snippet features of the clips; built once (about a minute on 2 cores), then read from the cache.

    Args:
        argument: not used; sources share a signature.
        task: "bags" for snippets with one label for each clip; "aligned" for clips as items of two modalities, `video` and
            `audio`. Each is a vector: the mean and the maximum over the snippets' features. The classes are normal and
            violent.
        train: number of training clips.
        valid: number of valid clips; -1 for half as many as test clips, at least 2.
        test: number of test clips.
        seed: seed of the scenes; another seed gives another set.
        visual: visual backbone, `NAME` or `NAME@WEIGHTS-FILE` (see `counterpoint.encoders`).
        audio: audio backbone, in the same form.
    """
    from counterpoint import encoders

    backbones = {
        "visual": encoders.build_visual(encoders.parse(visual)).describe(),
        "audio": encoders.build_audio(encoders.parse(audio)).describe(),
    }
    assets()
    valid = checked_count("arcade", valid, max(2, test // 2))
    notes: list[str] = []
    # The valid clips have a separate cache entry: the entry of the others must not depend on their number.
    rows = _stored([("train", n) for n in range(train)] + [("test", n) for n in range(test)], seed, backbones, notes)
    watched = _stored([("valid", n) for n in range(valid)], seed, backbones, notes)
    if task == "aligned":
        return _aligned(rows[:train], watched, rows[train:], notes)
    return BagData(
        name="arcade",
        train=[Bag(name, v, a, label) for name, label, v, a, _ in rows[:train]],
        valid=[TestVideo(name, v[None], a, label, t) for name, label, v, a, t in watched],
        test=[TestVideo(name, v[None], a, label, t) for name, label, v, a, t in rows[train:]],
        visual_dim=rows[0][2].shape[1],
        audio_dim=rows[0][3].shape[1],
        frames_per_snippet=FRAMES,
        snippet_seconds=SNIPPET,
        backbones=backbones,
        notes=notes,
    )


def _stored(jobs: list[tuple[str, int]], seed: int, backbones: dict[str, Any], notes: list[str]) -> list[Row]:
    """Return clips by split and number, from the cache; build them where it lacks them."""
    counts = Counter(split for split, _ in jobs)
    key = (VERSION, importlib.metadata.version("arcade"), counts, seed, backbones)
    return cached.build_once("arcade", key, lambda: _pack(_build(jobs, seed, backbones)), _unpack, notes=notes)


def _aligned(train: list[Row], valid: list[Row], test: list[Row], notes: list[str]) -> AlignedData:
    """Return clips as items, one vector for each modality."""

    def pooled(features: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([features.mean(0), features.max(0)]).astype(np.float32)

    def columns(rows: list[Row]) -> AlignedColumns:
        video = np.stack([pooled(visual) for _, _, visual, _, _ in rows])
        audio = np.stack([pooled(sound) for _, _, _, sound, _ in rows])
        labels = np.array([label for _, label, *_ in rows], np.int64)
        return AlignedColumns({"video": video, "audio": audio}, labels=labels)

    _, _, visual, sound, _ = train[0]
    kinds = {
        "video": Modality("vector", dim=2 * visual.shape[1]),
        "audio": Modality("vector", dim=2 * sound.shape[1]),
    }
    splits = columns(train), columns(valid), columns(test)
    return AlignedData("arcade", *splits, kinds, classes=("normal", "violent"), notes=notes)


def _build(jobs: list[tuple[str, int]], seed: int, backbones: dict[str, Any]) -> list[Row]:
    wanted = [(split, n, seed, backbones["visual"], backbones["audio"]) for split, n in jobs]
    return in_processes(features, wanted, "drawing arcade clips")


def _pack(rows: list[Row]) -> dict[str, NDArray[Any]]:
    return {
        "names": np.array([row[0] for row in rows]),
        "labels": np.array([row[1] for row in rows], np.int8),
        "lengths": np.array([len(row[2]) for row in rows]),
        "visual": np.concatenate([row[2] for row in rows]),
        "audio": np.concatenate([row[3] for row in rows]),
        "truth": np.concatenate([row[4] for row in rows]),
    }


def _unpack(stored: dict[str, NDArray[Any]]) -> list[Row]:
    cuts = np.cumsum(stored["lengths"])[:-1]
    return [
        (str(name), int(label), v, a, t)
        for name, label, v, a, t in zip(
            stored["names"],
            stored["labels"],
            np.split(stored["visual"], cuts),
            np.split(stored["audio"], cuts),
            np.split(stored["truth"], FRAMES * cuts),
            strict=True,
        )
    ]
