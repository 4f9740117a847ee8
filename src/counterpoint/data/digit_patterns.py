"""`digit-patterns`: two features in one picture, of which plain contrast learns the easy one: MCL's claim.

The first channel is a handwritten digit (8 x 8, scikit-learn's), the second one of 200 random black-and-white patterns, drawn
independently of the digit; the third is empty. The recipe of views `digit-patterns` shifts, cuts and blurs the first alone:
the pattern is the same in both views, easy and shared. The label is the digit; the pattern is the attribute `pattern`.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.images import ArrayImages, ImageData, split_positions
from counterpoint.data.valid import SHARE, by_content, carve
from counterpoint.errors import DataError


def load(
    argument: None = None, *, patterns: int = 200, held_out: float = 0.4, valid: float = SHARE, seed: int = 0
) -> ImageData:
    """The set.

    Args:
        patterns: how many there are; each digit gets one at random, in the test split anew.
        held_out: share of the digits in the test split, the same for every class.
        valid: share of the other digits in the valid split, the same for every class.
        seed: of the patterns and of who gets which.
    """
    from counterpoint.data.optical import load_digits

    if patterns < 2 or not 0 < held_out < 1:
        raise DataError("digit-patterns: at least 2 patterns, and held_out a share between 0 and 1")
    found = load_digits()
    labels = found.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    shapes = (rng.random((patterns, 8, 8)) < 0.5).astype(np.uint8) * 255
    chosen = rng.integers(0, patterns, len(labels))
    pixels = np.zeros((len(labels), 8, 8, 3), np.uint8)
    pixels[..., 0] = np.rint(found.images * (255 / 16))
    pixels[..., 1] = shapes[chosen]
    pool, test = split_positions(len(labels), held_out, labels)
    train, watched = carve("digit-patterns", pool, valid, labels[pool], by_content(found.images[pool]))
    return ImageData(
        name="digit-patterns",
        train=ArrayImages(pixels[train], labels[train]),
        valid=ArrayImages(pixels[watched], labels[watched]),
        test=ArrayImages(pixels[test], labels[test]),
        classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        size=8,
        attributes={"pattern": (chosen[train], chosen[watched], chosen[test])},
    )
