"""`moving-shapes`: clips of look-alike shapes that turn, drift, are covered and disappear; made from the world of shapes.

A clip has groups of shapes that differ only slightly in colour. In each frame a shape is seen as a crop. Over time it turns,
grows or shrinks, and changes its shade. For some frames in a row a bar covers a part of it, or it is absent and comes back.
Further detections of each frame show the ground, or a part of a shape that belongs to no instance.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from counterpoint.data.frames import OTHER, PADDING, ArrayClips, Clip, ClipData
from counterpoint.data.images import checked_size
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds import shapes as world
from counterpoint.errors import CounterpointError


def load(
    argument: None = None,
    *,
    train: int = 120,
    valid: int = -1,
    test: int = 40,
    frames: int = 12,
    least: int = 6,
    most: int = 10,
    others: int = 6,
    alike: float = 18.0,
    absent: float = 0.5,
    covered: float = 0.5,
    size: int = 24,
    seed: int = 0,
) -> ClipData:
    """Draw the set (a few seconds).

    Args:
        argument: not used; sources share a signature.
        train, test: numbers of clips, at least 2.
        valid: number of valid clips; -1 for as many as test clips.
        frames: number of frames of a clip, at least 2.
        least, most: range of the number of instances in a clip, 1 to 50.
        others: number of detections of no instance in each frame, at least 0.
        alike: standard deviation of the colours within a group, in 0..255.
        absent: probability that an instance is absent for 1 to 4 frames in a row, 0..1.
        covered: probability that a bar covers a part of an instance for 2 to 5 frames, 0..1.
        size: height and width of a crop in pixels, 8 to 4096.
        seed: seed of the clips, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    checked_size(size)
    if (
        min(train, test) < 2
        or frames < 2
        or not 1 <= least <= most <= 50
        or others < 0
        or alike < 0
        or not 0 <= absent <= 1
        or not 0 <= covered <= 1
        or seed < 0
    ):
        raise CounterpointError(
            "moving-shapes: train, test and frames must be at least 2. It needs 1 <= least <= most <= 50. others, alike and seed "
            f"must not be negative; absent and covered lie in 0..1. Got {train=}, {test=}, {frames=}, {least=}, {most=}, "
            f"{others=}, {alike=}, {absent=}, {covered=}, {seed=}"
        )
    splits = []
    for number, count in enumerate((train, checked_count("moving-shapes", valid, test), test)):
        rng = np.random.default_rng([2307_12616, seed, number])
        clips = [_clip(rng, frames, int(rng.integers(least, most + 1)), most, others, alike, absent, covered, size)
                 for _ in range(count)]  # fmt: skip
        splits.append(ArrayClips(clips))
    return ClipData("moving-shapes", splits[0], splits[1], splits[2], size)


def _run(rng: np.random.Generator, frames: int, chance: float, shortest: int, longest: int) -> np.ndarray:
    """Return [frames] whether a frame lies in a run that is drawn with this probability."""
    found = np.zeros(frames, bool)
    if rng.random() < chance:
        length = int(rng.integers(shortest, longest + 1))
        start = int(rng.integers(1, max(2, frames - length)))
        found[start : start + length] = True
    return found


def _clip(
    rng: np.random.Generator,
    frames: int,
    count: int,
    most: int,
    others: int,
    alike: float,
    absent: float,
    covered: float,
    size: int,
) -> Clip:
    """Draw a clip. Its detections are in random order within each frame."""
    crops = np.zeros((frames, most + others, size, size, 3), np.uint8)
    identities = np.full((frames, most + others), PADDING, np.int64)
    scores = np.zeros((frames, most + others), np.float32)
    ground = world.scene(rng, 1, 1).background
    models: list[world.Object] = []
    while len(models) < count:  # groups of two or three look-alikes
        first = world.scene(rng, 1, 1).objects[0]
        for _ in range(int(rng.integers(2, 4))):
            colours = np.clip(np.stack([first.colour, first.other]) + alike * rng.standard_normal((2, 3)), 0, 255)
            models.append(replace(first, colour=colours[0], other=colours[1]))
    for number, shown in enumerate(models[:count]):
        angle, zoom = rng.uniform(0, 360), rng.uniform(0.8, 1.1)
        turning, growing, shading = rng.normal(0, 9), rng.normal(0, 0.02), rng.normal(0, 2.5, 3)
        speckles = int(rng.integers(2**31))
        gone, hidden = _run(rng, frames, absent, 1, 4), _run(rng, frames, covered, 2, 5)
        side = int(rng.integers(4))
        for t in range(frames):
            if gone[t]:
                continue
            pixels, own = world.portrait(
                shown,
                size,
                np.random.default_rng(speckles),
                angle + turning * t,
                float(np.clip(zoom + growing * t, 0.6, 1.3)),
                (rng.normal(0, 0.03), rng.normal(0, 0.03)),
            )
            picture = np.where(own[..., None], pixels + shading * t, ground)
            if hidden[t]:
                picture = np.rot90(picture, side).copy()
                picture[: int(size * rng.uniform(0.35, 0.6))] = 110
                picture = np.rot90(picture, -side)
            crops[t, number] = _noisy(picture, rng)
            identities[t, number] = number
            scores[t, number] = rng.uniform(0.5, 1.0) * (0.7 if hidden[t] else 1.0)
    for t in range(frames):
        for place in range(most, most + others):
            picture = np.broadcast_to(ground, (size, size, 3)).copy()
            if rng.random() < 0.5:  # a part of a shape, at the edge of the crop
                shift = rng.choice([-0.55, 0.55], 2) * rng.uniform(0.7, 1.0, 2)
                shown = models[int(rng.integers(count))]
                pixels, own = world.portrait(shown, size, rng, rng.uniform(0, 360), 1.0, (shift[0], shift[1]))
                picture[own] = pixels[own]
            crops[t, place] = _noisy(picture, rng)
            identities[t, place] = OTHER
            scores[t, place] = rng.uniform(0.02, 0.4)
        order = rng.permutation(most + others)
        crops[t], identities[t], scores[t] = crops[t, order], identities[t, order], scores[t, order]
    return Clip(crops, identities, scores)


def _noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.rint(picture + 6 * rng.standard_normal(picture.shape)), 0, 255).astype(np.uint8)
