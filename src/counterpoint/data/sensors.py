"""`sensors`: scenes of the world of shapes as four sensors see them, with a class for each pixel and captions.

    rgb      colours and textures; some scenes are at night, nearly black
    depth    brightness of the ground by its row, plus the height of the class, with noise
    event    edges of the scene by day: brighter in red, darker in blue; some are missed, some are false
    lidar    the depth at few pixels, black elsewhere

Colours are random, so colour alone tells no class. Two classes share a shape, two a texture and two pairs a height: no sensor
alone tells all classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.dense import ArrayScenes, DenseData, aligned_scenes, hidden
from counterpoint.data.images import checked_size
from counterpoint.data.pairs import AlignedData
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds import shapes as world
from counterpoint.errors import CounterpointError

SENSORS = ("rgb", "depth", "event", "lidar")
DARK = 0.05  # brightness of a night, in shares of the day's
NUMBERS = ("no", "a", "two", "three", "four", "five", "six")


class Kind(NamedTuple):
    """A class of objects."""

    name: str
    shape: int  # of world.SHAPES
    texture: int  # of world.TEXTURES
    height: float  # 0..1


KINDS = (
    Kind("tree", 2, 1, 0.7),
    Kind("car", 1, 0, 0.35),
    Kind("person", 0, 2, 0.35),
    Kind("wall", 1, 1, 0.7),
    Kind("ball", 0, 3, 0.15),
)
REGIONS = ("road", *(kind.name for kind in KINDS))


def load(
    argument: None = None,
    *,
    task: str = "dense",
    train: int = 800,
    valid: int = -1,
    test: int = 200,
    size: int = 48,
    night: float = 0.25,
    points: float = 0.05,
    labelled: int = -1,
    seed: int = 0,
) -> DenseData | AlignedData:
    """Draw the set (a few seconds).

    Args:
        argument: not used; sources share a signature.
        task: "dense" or "views" for pictures with masks; "aligned" for the four sensors and captions.
        train, test: numbers of scenes, at least 2.
        valid: number of valid scenes; -1 for as many as test scenes.
        size: height and width in pixels, 8 to 4096.
        night: share of scenes whose rgb picture is nearly black, 0 to 1.
        points: share of pixels with a lidar point, above 0 to 1.
        labelled: number of training scenes with a mask. -1: all.
        seed: seed of the scenes, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    checked_size(size)
    if min(train, test) < 2 or labelled < -1 or labelled == 0 or seed < 0 or not 0 <= night <= 1 or not 0 < points <= 1:
        raise CounterpointError(
            "sensors: train and test must be at least 2. Night lies in 0..1, and points too, without 0. Labelled is -1 or at "
            f"least 1. Seed is at least 0; got {train=}, {test=}, {night=}, {points=}, {labelled=}, {seed=}"
        )
    splits = []
    for number, count in enumerate((train, checked_count("sensors", valid, test), test)):
        rng = np.random.default_rng([2407_11351, seed, number])
        pixels = {name: np.empty((count, size, size, 3), np.uint8) for name in SENSORS}
        masks, captions = np.empty((count, size, size), np.uint8), []
        for n in range(count):
            truth, kinds = scene(rng)
            seen, masks[n] = render(truth, kinds, size, rng, night, points)
            for name, picture in seen.items():
                pixels[name][n] = picture
            captions.append(caption(masks[n], kinds))
        kept = hidden(masks, labelled) if number == 0 else masks
        splits.append(ArrayScenes(pixels, kept, captions=captions))
    data = DenseData(
        "sensors",
        splits[0],
        splits[1],
        splits[2],
        (),
        size,
        regions=REGIONS,
        modalities=SENSORS,
        background=False,
    )
    return aligned_scenes(data) if task == "aligned" else data


def scene(rng: np.random.Generator) -> tuple[world.Scene, list[int]]:
    """Draw a scene of two to five objects, and the number of each object's kind."""
    truth = world.scene(rng, 2, 5)
    kinds = rng.integers(len(KINDS), size=len(truth.objects)).tolist()
    objects = [
        world.Object(KINDS[kind].shape, KINDS[kind].texture, one.colour, one.other, one.place, one.radius, one.phase)
        for kind, one in zip(kinds, truth.objects, strict=True)
    ]
    return world.Scene(tuple(objects), truth.background), kinds


def render(
    truth: world.Scene, kinds: list[int], size: int, rng: np.random.Generator, night: float, points: float
) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.uint8]]:
    """Render a scene for the four sensors, [size, size, 3] each, and its mask [size, size]."""
    day, owner = world.render(truth, size, rng)
    mask = np.array([0, *(1 + kind for kind in kinds)], np.uint8)[owner]
    # Depth: the ground is nearer at the bottom; an object has the ground's value at its centre, plus its height.
    ground = 30 + 90 * (np.arange(size) + 0.5) / size
    depth = np.repeat(ground[:, None], size, 1)
    for number, (kind, one) in enumerate(zip(kinds, truth.objects, strict=True), start=1):
        depth[owner == number] = 30 + 90 * one.place[0] + 130 * KINDS[kind].height
    depth = depth + rng.normal(0, 6, depth.shape)
    lidar = np.where(rng.random(depth.shape) < points, depth, 0)
    # Events: changes of brightness along a row or a column.
    light = day.mean(2)
    change = np.diff(light, axis=0, prepend=light[:1]) + np.diff(light, axis=1, prepend=light[:, :1])
    change = change + rng.normal(0, 8, change.shape)
    fired = (np.abs(change) > 30) & (rng.random(change.shape) > 0.3)
    false = rng.random(change.shape) < 0.03
    event = np.zeros((size, size, 3))
    event[..., 0] = 255 * ((fired & (change > 0)) | (false & (change > 0)))
    event[..., 2] = 255 * ((fired & (change < 0)) | (false & (change < 0)))
    rgb = np.clip(day * (DARK if rng.random() < night else 1.0) + rng.normal(0, 2, day.shape), 0, 255)
    seen = {"rgb": rgb, "depth": _grey(depth), "event": event, "lidar": _grey(lidar)}
    return {name: np.clip(np.rint(picture), 0, 255).astype(np.uint8) for name, picture in seen.items()}, mask


def caption(mask: NDArray[np.uint8], kinds: list[int]) -> str:
    """Describe a scene by its road and the objects of the kinds that are visible: "a road with two trees and a car"."""
    counts = [0] * len(KINDS)
    for kind in kinds:
        counts[kind] += int((mask == 1 + kind).any())
    said = [
        f"{NUMBERS[count]} {_plural(KINDS[kind].name) if count > 1 else KINDS[kind].name}"
        for kind, count in enumerate(counts)
        if count
    ]
    if not said:
        return "a road"
    return "a road with " + (f"{', '.join(said[:-1])} and {said[-1]}" if len(said) > 1 else said[0])


def _plural(name: str) -> str:
    return "people" if name == "person" else f"{name}s"


def _grey(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.repeat(values[..., None], 3, axis=2)
