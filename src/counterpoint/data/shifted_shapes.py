"""`shifted-shapes`: scenes of plain shapes in two domains with boxes; made from the world of shapes.

The source has shapes on a clean grey ground. The target has tinted colours, which are inverted in half of its pictures, a textured
ground, and blur. A class is a shape in one of two textures.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.dense import Boxes
from counterpoint.data.images import checked_size
from counterpoint.data.regions import SOURCE, TARGET, ArrayRegions, Proposals, RegionData, drawn_proposals
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds import shapes as world
from counterpoint.errors import CounterpointError

GREY = np.full(3, 128.0)
TEXTURES = (0, 2)  # stripes and dots of world.TEXTURES
CLASSES = tuple(f"{world.ADJECTIVES[texture]} {shape}" for shape in world.SHAPES for texture in TEXTURES)


def load(
    argument: None = None,
    *,
    train: int = 300,
    target: int = 300,
    valid: int = -1,
    test: int = 100,
    size: int = 64,
    proposals: int = 40,
    shift: float = 1.0,
    seed: int = 0,
) -> RegionData:
    """Draw the set (a few seconds).

    Args:
        argument: not used; sources share a signature.
        train: training pictures of the source, at least 2.
        target: training pictures of the target, at least 2.
        valid: number of valid pictures; -1 for as many as test pictures. They are of the target.
        test: number of test pictures of the target, at least 2.
        size: height and width in pixels, 16 to 4096.
        proposals: boxes of a picture, 4 to 2000.
        shift: strength of the target's shift, 0 (none) to 1 (default).
        seed: seed of the scenes, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    checked_size(size)
    if min(train, target, test) < 2 or size < 16 or not 4 <= proposals <= 2000 or not 0 <= shift <= 1 or seed < 0:
        raise CounterpointError(
            "shifted-shapes: train, target and test must be at least 2, and size at least 16. It needs proposals in 4..2000, "
            "shift in 0..1 and a seed of at least 0. "
            f"Got {train=}, {target=}, {test=}, {size=}, {proposals=}, {shift=}, {seed=}"
        )
    splits = []
    for number, domains in enumerate(
        ([SOURCE] * train + [TARGET] * target, [TARGET] * checked_count("shifted-shapes", valid, test), [TARGET] * test)
    ):
        rng = np.random.default_rng([2410_05557, seed, number])
        drawn = [_picture(rng, size, proposals, shift if domain == TARGET else 0.0) for domain in domains]
        found = [boxes for _, boxes in drawn]
        splits.append(ArrayRegions(np.stack([pixels for pixels, _ in drawn]), found, np.array(domains, np.int64)))
    return RegionData("shifted-shapes", splits[0], splits[1], splits[2], size, proposals, CLASSES)


def _picture(rng: np.random.Generator, size: int, count: int, shift: float) -> tuple[NDArray[np.uint8], Proposals]:
    """Draw a picture of three shapes and its proposals."""
    from scipy.ndimage import gaussian_filter

    truth = world.scene(rng, 3, 3)
    objects = tuple(replace(one, texture=int(rng.choice(TEXTURES)), radius=0.9 * one.radius) for one in truth.objects)
    truth = world.Scene(objects, GREY)
    pixels, owner = world.render(truth, size, rng)
    found = pixels.astype(float)
    if shift:
        # Two waves and grain make the ground; colours are inverted and multiplied by a tint.
        rows, columns = np.mgrid[:size, :size] * (rng.uniform(8, 20, (2, 1, 1)) / size)
        waves = np.sin(rows + columns * rng.uniform(-1, 1) + rng.uniform(0, 6)) * np.cos(columns + rng.uniform(0, 6))
        ground = (28 * waves + 14 * rng.standard_normal((size, size)))[..., None] * (owner == 0)[..., None]
        tint = 1 - shift * rng.uniform(0, 0.45, 3)
        inverted = rng.random() < shift / 2
        changed = ((255 - found if inverted else found) + shift * ground) * tint + 25 * (1 - tint)
        found = gaussian_filter(changed, (shift * rng.uniform(0.3, 0.9) * size / 64,) * 2 + (0,))
    found = np.clip(np.rint(found + 4 * rng.standard_normal(found.shape)), 0, 255).astype(np.uint8)
    boxes = world.boxes(truth, owner)
    kinds = [len(TEXTURES) * objects[n - 1].shape + TEXTURES.index(objects[n - 1].texture) for n in boxes.identities]
    own = Boxes(boxes.corners, np.array(kinds, np.int64), boxes.identities)
    return found, drawn_proposals(rng, own, count, (size, size), len(CLASSES))
