"""`digits`: the 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels, scaled up to 32 x 32 RGB.

A digit in sixteen shades is enlarged by bicubic interpolation. The splits are fixed: every class in proportion, 1,295 for
training, 143 for the valid split and 359 for the test.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.images import ArrayImages, ImageData, checked_size, long_tailed, split_positions
from counterpoint.data.valid import SHARE, by_content, carve
from counterpoint.errors import DataError


def load(
    argument: None = None,
    *,
    size: int = 32,
    held_out: float = 0.2,
    valid: float = SHARE,
    train: int = 0,
    labelled: int = 0,
    imbalance: float = 0.0,
    seed: int = 0,
) -> ImageData:
    """The digits at `size` pixels; the test split is the same at every size.

    Args:
        size: height and width.
        held_out: share of the digits in the test split, the same for every class.
        valid: share of the other digits in the valid split, the same for every class.
        train: only so many training digits, drawn with `seed`; 0 for all.
        labelled: how many of those that could be drawn have a label for evaluators (neighbours, linear probe), the ones
            that are trained on first; 0 for the training digits.
        imbalance: make the training split long-tailed, so many times more zeros than nines (see `images.long_tailed`); 0 leaves
            it as it is.
        seed: of both draws.
    """
    from counterpoint.data.optical import load_digits

    checked_size(size)
    found = load_digits()
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)
    pixels = np.stack([_scaled(image, size) for image in grey])
    labels = found.target.astype(np.int64)
    if not 0 < held_out < 1:
        raise DataError(f"digits: held_out is a share between 0 and 1, got {held_out}")
    pool, test = split_positions(len(labels), held_out, labels)
    chosen, watched = carve("digits", pool, valid, labels[pool], by_content(grey[pool]))
    if imbalance:
        chosen = chosen[long_tailed(labels[chosen], imbalance, seed)]
    for name, number in (("train", train), ("labelled", labelled)):
        if number and not 2 <= number <= len(chosen):
            raise DataError(f"digits: {name} is 2 to {len(chosen)} digits, got {number}")
    drawn = np.random.default_rng(seed).permutation(chosen)
    known = np.sort(drawn[:labelled])
    if train:
        chosen = np.sort(drawn[:train])
    return ImageData(
        name="digits",
        train=ArrayImages(pixels[chosen], labels[chosen]),
        valid=ArrayImages(pixels[watched], labels[watched]),
        test=ArrayImages(pixels[test], labels[test]),
        bank=ArrayImages(pixels[known], labels[known]) if labelled else None,
        classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        size=size,
    )


def _scaled(grey: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC))
