"""`sprites`: pictures of moving sprites and the events among them, with captions of the visible objects.

An item is a moment of a scene of the world of sprites (`data/worlds/sprites/`). That world also has masks, boxes and
identities. The item's picture is a square around an event, as high as the scene's picture. Its class is the event's
kind; all kinds are equally likely. Its caption names the visible objects, with numbers and ground: "two bees and a blue
tank on grass, an explosion". The task `aligned` takes pictures and captions, and with `?sound=1` also one second of
sound. For `views` a picture's label is its class.

The second of sound is the part of the event's own sound that belongs to the picture. In the scene it may sound later. If the
event is silent, or its sound ends earlier, the item lacks the modality.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL import __version__ as pillow

from counterpoint.data import cached
from counterpoint.data.images import ArrayImages, ImageData, checked_size
from counterpoint.data.pairs import AlignedColumns, AlignedData, ArrayWaves, Modality
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds.sprites import scenes
from counterpoint.data.worlds.sprites.artwork import assets
from counterpoint.data.worlds.sprites.captions import caption
from counterpoint.data.worlds.sprites.drawing import Drawing, Look
from counterpoint.data.worlds.sprites.sounds import render_audio
from counterpoint.data.worlds.workers import in_processes
from counterpoint.errors import CounterpointError

VERSION = 1  # of the choice of moments and of the cut: increase it with every change, or stale caches are read
CLASSES = ("explosion", "hit", "hurt", "laser", "coin", "jump", "upgrade", "meteors", "torch")
SPLITS = ("train", "valid", "test")
LEAST = 40  # pixels of the square that an object must cover to be named
RATE, SECONDS = scenes.RATE, 1.0


class Moment(NamedTuple):
    """The truth of an item."""

    scene: scenes.Scene
    event: scenes.Event  # the one in the middle
    time: float  # seconds
    look: Look  # of the whole picture
    left: int  # left edge of the square, in pixels
    tile: str | None  # material of the ground; None in open space
    seen: tuple[int, ...]  # identities in the square


def moment(split: str, index: int, seed: int = 0) -> Moment:
    """Draw the truth of an item: its class, and the first scene of its seeds where such an event is well visible.

    Args:
        split: train, valid or test.
        index: the item's number in the split.
        seed: seed of the set.
    """
    place = (VERSION, seed, SPLITS.index(split), index)
    rng = np.random.default_rng(place)
    kind = CLASSES[rng.integers(len(CLASSES))]
    for attempt in itertools.count():
        scene = scenes.scene((*place, attempt), f"{split}-{index:04d}")
        events = [event for event in scene.events if event.visible and event.kind == kind]
        if not events:
            continue
        event = events[rng.integers(len(events))]
        assert event.visible is not None
        time = float(rng.uniform(*event.visible))
        drawing = Drawing(scene)
        look = drawing.look(time)
        identity = drawing.identity(event)
        height, width = look.owner.shape
        across = np.sort(np.nonzero(look.mask(identity))[1])
        if len(across) < LEAST:
            continue
        left = int(np.clip(across[len(across) // 2] - height // 2, 0, width - height))
        numbers, pixels = np.unique(look.owner[:, left : left + height], return_counts=True)
        seen = tuple(int(n) for n, count in zip(numbers, pixels, strict=True) if n and count >= LEAST)
        if identity in seen:
            return Moment(scene, event, time, look, left, drawing.tile, seen)
    raise AssertionError  # the count has no end


def picture(truth: Moment, size: int) -> NDArray[np.uint8]:
    """Render the square of an item: [size, size, 3] uint8."""
    height = truth.look.pixels.shape[0]
    square = Image.fromarray(truth.look.pixels[:, truth.left : truth.left + height])
    return np.asarray(square.resize((size, size), Image.Resampling.BOX))


def heard(truth: Moment) -> NDArray[np.int16] | None:
    """Render the second of sound of an item: int16 [16000]; None where its event is not heard."""
    event = truth.event
    assert event.visible is not None
    if event.audible is None:
        return None
    start = event.audible[0] + truth.time - event.visible[0]
    if start >= event.audible[1]:
        return None
    wave = render_audio(truth.scene)
    cut = wave[round(start * RATE) : round((start + SECONDS) * RATE)]
    return np.rint(32767 * np.pad(cut, (0, round(SECONDS * RATE) - len(cut)))).astype(np.int16)


def load(
    argument: None = None,
    *,
    task: str = "aligned",
    train: int = 1600,
    valid: int = -1,
    test: int = 400,
    size: int = 64,
    sound: int = 0,
    seed: int = 0,
) -> AlignedData | ImageData:
    """Open the set; draw the items that are not in the cache (half a minute on 2 cores).

    Args:
        argument: not used; sources share a signature.
        task: "aligned" for pictures and captions; "views" for pictures with classes.
        train, test: numbers of items, at least 2.
        valid: number of valid items; -1 for half as many as test items.
        size: height and width of a picture in pixels, 8 to 4096.
        sound: 1 adds the modality `audio`, a second at 16 kHz (task aligned). 0 omits it.
        seed: seed of the scenes, at least 0; another seed gives another set.

    Raises CounterpointError when the package arcade is not installed or an option is out of range.
    """
    checked_size(size)
    if min(train, test) < 2 or sound not in (0, 1) or seed < 0:
        raise CounterpointError(
            "sprites needs train and test of at least 2, sound of 0 or 1, a seed of at least 0; "
            f"got {train=}, {test=}, {sound=}, {seed=}"
        )
    if sound and task == "views":
        raise CounterpointError("sprites: sound=1 is only for the task aligned; remove it for the task views")
    assets()
    counts = {"train": train, "valid": checked_count("sprites", valid, max(2, test // 2)), "test": test}
    notes: list[str] = []
    made = [_stored(split, count, seed, size, bool(sound), notes) for split, count in counts.items()]
    if task == "views":
        labelled = [ArrayImages(rows["pixels"], rows["labels"]) for rows in made]
        return ImageData("sprites", labelled[0], labelled[1], labelled[2], CLASSES, size, notes)

    def columns(rows: cached.Arrays) -> AlignedColumns:
        found: dict[str, Any] = {"image": ArrayImages(rows["pixels"]), "text": rows["captions"].tolist()}
        if sound:
            found["audio"] = ArrayWaves(rows["waves"])
        return AlignedColumns(found, rows["labels"], {"audio": rows["heard"]} if sound else None)

    kinds = {"image": Modality("image", size=size), "text": Modality("text")}
    if sound:
        kinds["audio"] = Modality("audio", rate=RATE, samples=round(SECONDS * RATE))
    splits = [columns(rows) for rows in made]
    return AlignedData("sprites", splits[0], splits[1], splits[2], kinds, classes=CLASSES, notes=notes)


def _item(split: str, index: int, seed: int, size: int, sound: bool) -> tuple[Any, ...]:
    """Render an item: picture, caption, class, sound."""
    truth = moment(split, index, seed)
    words = caption((truth.look.things[n] for n in truth.seen), truth.tile)
    return picture(truth, size), words, CLASSES.index(truth.event.kind), heard(truth) if sound else None


def _stored(split: str, count: int, seed: int, size: int, sound: bool, notes: list[str]) -> cached.Arrays:
    """Return a split, from the cache or drawn into it; `notes` receives a line where a damaged file was replaced."""

    def build() -> cached.Arrays:
        jobs = [(split, index, seed, size, sound) for index in range(count)]
        return _packed(in_processes(_item, jobs, f"drawing sprites ({split})"), sound)

    def read(arrays: cached.Arrays) -> cached.Arrays:
        if arrays["pixels"].shape != (count, size, size, 3) or len(arrays["captions"]) != count:
            raise ValueError(f"pictures of shape {list(arrays['pixels'].shape)}")
        return arrays

    key = (VERSION, scenes.VERSION, importlib.metadata.version("arcade"), pillow, split, count, seed, size, sound)
    return cached.build_once("sprites", key, build, read, notes=notes)


def _packed(items: Sequence[tuple[Any, ...]], sound: bool) -> cached.Arrays:
    pixels, words, labels, waves = zip(*items, strict=True)
    rows: cached.Arrays = {
        "pixels": np.stack(pixels),
        "captions": np.array(words),
        "labels": np.array(labels, np.int64),
    }
    if sound:
        silence = np.zeros(round(SECONDS * RATE), np.int16)
        rows["waves"] = np.stack([silence if wave is None else wave for wave in waves])
        rows["heard"] = np.array([wave is not None for wave in waves])
    return rows
