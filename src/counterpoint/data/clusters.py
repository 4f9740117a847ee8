"""`clusters`: grey pictures of 8 x 8 pixels drawn from Gaussian clusters of very different sizes: data of iSogCLR's claim.

A cluster's centre is a standard normal vector of 24 dimensions. Its examples have a standard deviation of 0.5 around it. A
matrix with orthonormal columns maps them to pixels: one unit is 0.12 of the grey scale, and zero is middle grey. Sizes fall
geometrically from `largest` to `smallest`. The label is the cluster. The views recipe `clusters` adds noise of 0.4 units.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.images import ArrayImages, ImageData
from counterpoint.data.valid import checked_count
from counterpoint.errors import DataError

DIMENSIONS, SIDE, SCALE, SPREAD = 24, 8, 0.12, 0.5


def load(
    argument: None = None,
    *,
    clusters: int = 12,
    largest: int = 120,
    smallest: int = 4,
    valid: int = -1,
    test: int = 40,
    seed: int = 0,
) -> ImageData:
    """Draw the set.

    Args:
        argument: not used; sources share a signature.
        clusters: number of clusters, at least 2.
        largest, smallest: numbers of training examples of the largest and the smallest cluster, at least 1. The sizes
            between fall geometrically.
        valid: number of valid examples of each cluster; -1 for as many as `test`.
        test: number of test examples of each cluster, at least 1.
        seed: seed of all draws.

    Raises DataError for numbers out of range.
    """
    if clusters < 2 or not 1 <= smallest <= largest or test < 1:
        raise DataError(
            "clusters: needs clusters >= 2, 1 <= smallest <= largest and test >= 1; "
            f"got {clusters=}, {smallest=}, {largest=}, {test=}"
        )
    valid = checked_count("clusters", valid, test)
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, DIMENSIONS))
    basis = np.linalg.qr(rng.standard_normal((SIDE * SIDE, DIMENSIONS)))[0]
    sizes = np.rint(np.geomspace(largest, smallest, clusters)).astype(int)

    def drawn(counts: np.ndarray) -> ArrayImages:
        labels = np.repeat(np.arange(clusters), counts)
        points = centres[labels] + SPREAD * rng.standard_normal((len(labels), DIMENSIONS))
        grey = np.clip(np.rint(255 * (0.5 + SCALE * points @ basis.T)), 0, 255).astype(np.uint8)
        return ArrayImages(np.repeat(grey.reshape(-1, SIDE, SIDE, 1), 3, axis=3), labels.astype(np.int64))

    names = tuple(f"cluster of {size}" for size in sizes)
    train, tested = drawn(sizes), drawn(np.full(clusters, test))
    return ImageData("clusters", train, drawn(np.full(clusters, valid)), tested, names, SIDE)
