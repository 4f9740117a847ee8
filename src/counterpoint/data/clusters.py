"""`clusters`: grey pictures of 8 x 8 pixels drawn from Gaussian clusters of very different sizes: the setting of iSogCLR's
claim.

A cluster's centre is Gaussian in 24 dimensions, its examples are spread around it by 0.5; a rotation with orthonormal columns
makes pixels of them, 0.12 of the grey scale for one unit around middle grey. Sizes fall geometrically from `largest` to
`smallest`. The label is the cluster. The views recipe `clusters` adds noise of 0.4 in those units.
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
    """The set.

    Args:
        clusters: how many.
        largest, smallest: training examples of the largest and the smallest; those between fall geometrically.
        valid: examples of each cluster to watch training on; -1 for as many as `test`.
        test: held-out examples of each cluster.
        seed: of everything drawn.
    """
    if clusters < 2 or not 1 <= smallest <= largest or test < 1:
        raise DataError("clusters: at least 2 clusters, 1 <= smallest <= largest, at least one test example each")
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
