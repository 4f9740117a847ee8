"""`phantoms`: synthetic volumes of three tissues that lie alike in every subject, with a class for each pixel of each slice.

A ring around a cavity and a blob beside it drift along the axis, alike in all subjects. Subjects differ in place,
size and intensities. A smooth bias field, noise and three other blobs make slices hard to read. Voxels are cubes of 1 mm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.dense import IGNORE, ArrayScenes, DenseData
from counterpoint.data.images import checked_size
from counterpoint.data.valid import checked_count
from counterpoint.errors import CounterpointError

REGIONS = ("background", "ring", "cavity", "blob")


def load(
    argument: None = None,
    *,
    task: str = "dense",
    train: int = 21,
    labelled: int = 1,
    valid: int = -1,
    test: int = 8,
    slices: int = 16,
    size: int = 48,
    seed: int = 0,
) -> DenseData:
    """Draw the set (a second).

    Args:
        argument: not used; sources share a signature.
        task: "dense", or "views" to learn from the pictures; the result is the same.
        train: number of training volumes, at least 1.
        labelled: number of training volumes with masks, 1 to `train`.
        valid: number of valid volumes; -1 for one.
        test: number of test volumes, at least 1.
        slices: slices of a volume, at least 2.
        size: height and width of a slice in pixels, 8 to 4096.
        seed: seed of the volumes, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    checked_size(size)
    if not 1 <= labelled <= train or test < 1 or slices < 2 or seed < 0:
        raise CounterpointError(
            f"phantoms: it needs 1 <= labelled <= train. test is at least 1, slices at least 2, and seed at least 0; got "
            f"{train=}, {labelled=}, {test=}, {slices=}, {seed=}"
        )
    splits = []
    for number, count in enumerate((train, checked_count("phantoms", valid, 1), test)):
        rng = np.random.default_rng([2006_10511, seed, number])
        volumes = [_volume(rng, slices, size) for _ in range(count)]
        masks = np.concatenate([mask for _, mask in volumes])
        if number == 0:
            masks[labelled * slices :] = IGNORE
        groups = np.repeat(np.arange(count), slices)
        pixels = np.concatenate([pixels for pixels, _ in volumes])
        splits.append(ArrayScenes(pixels, masks, groups=groups, spacings=np.ones((count, 3))))
    return DenseData("phantoms", splits[0], splits[1], splits[2], (), size, regions=REGIONS)


def _volume(rng: np.random.Generator, slices: int, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one subject: slices [slices, size, size] in grey, and their class numbers."""
    at = (np.arange(size) + 0.5) / size
    down, across = np.meshgrid(at, at, indexing="ij")
    shift, scale = rng.normal(0, 0.03, 2), rng.uniform(0.88, 1.12)
    tones = np.array([0.35, 0.6, 0.45, 0.52]) + rng.normal(0, 0.05, 4)  # ground and the three tissues
    others = [(rng.uniform(0.1, 0.9, 2), rng.uniform(0.04, 0.08), rng.uniform(0.3, 0.7)) for _ in range(3)]
    waves = rng.normal(0, 0.06, (2, 2))
    pixels = np.empty((slices, size, size))
    masks = np.zeros((slices, size, size), np.uint8)
    for z in range(slices):
        along = z / (slices - 1)
        centre = np.array([0.45 + 0.12 * along, 0.42 + 0.1 * np.sin(np.pi * along)]) + shift
        reach = scale * (0.1 + 0.14 * np.sin(np.pi * (0.15 + 0.7 * along)))
        inner = reach * (0.45 + 0.25 * along)
        distance = np.hypot(down - centre[0], (across - centre[1]) * 1.15)
        blob = centre + np.array([0.02, 0.30 - 0.06 * along])
        beside = np.hypot((down - blob[0]) / 1.5, across - blob[1]) < scale * 0.09 * np.sin(np.pi * (0.1 + 0.8 * along))
        mask = np.where(distance < inner, 2, np.where(distance < reach, 1, np.where(beside, 3, 0)))
        masks[z] = mask
        picture = tones[mask]
        for place, radius, tone in others:
            covered = (np.hypot(down - place[0], across - place[1]) < radius * np.sin(np.pi * (0.2 + 0.6 * along))) & (
                mask == 0
            )
            picture = np.where(covered, tone, picture)
        bias = (
            1
            + waves[0, 0] * np.sin(3 * down + 2 * along)
            + waves[0, 1] * np.cos(3 * across)
            + waves[1, 0] * down * across
        )
        pixels[z] = picture * bias + rng.normal(0, 0.04, (size, size))
    return np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8), masks
