"""`digits`: the 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels, scaled up to 32 x 32 RGB.

A digit in sixteen shades is enlarged by bicubic interpolation. The split is fixed: every class in proportion, 1,438 for
training and 359 for the test.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.images import ArrayImages, ImageData, checked_size, split_positions


def load(argument: None = None, *, size: int = 32) -> ImageData:
    """The digits at `size` pixels; the test split is the same at every size."""
    from sklearn.datasets import load_digits

    checked_size(size)
    found = load_digits()
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)
    pixels = np.stack([_scaled(image, size) for image in grey])
    labels = found.target.astype(np.int64)
    train, test = split_positions(len(labels), 0.2, labels)
    return ImageData(
        name="digits",
        train=ArrayImages(pixels[train], labels[train]),
        test=ArrayImages(pixels[test], labels[test]),
        classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        size=size,
    )


def _scaled(grey: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC))
