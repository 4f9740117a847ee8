"""`clustered-pairs`: vectors in two modalities whose items stand close together in clusters: data of DCD's claim.

A hidden z has 16 numbers. The first 8 are one of 40 random centres. The other 8 are the item's own, with a standard deviation of
0.3. Each modality is tanh of a random map of z to 24 numbers, plus noise. Items of one cluster share the larger half of z, so they
are hard negatives of each other. A random other item is nearly always of another cluster, and easy to reject.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import checked_count
from counterpoint.errors import CounterpointError

SHARED, OWN, DIM = 8, 8, 24
VIEWS = ("first", "second")


def load(
    argument: None = None,
    *,
    train: int = 3000,
    valid: int = -1,
    test: int = 300,
    clusters: int = 40,
    spread: float = 0.3,
    noise: float = 0.05,
    seed: int = 0,
) -> AlignedData:
    """Draw training, valid and test items from one set of centres and maps.

    Args:
        argument: not used; sources share a signature.
        train: number of training items, at least 2.
        valid: number of valid items; -1 for as many as test items.
        test: number of test items, at least 2.
        clusters: number of centres, at least 1.
        spread: standard deviation of the item's own 8 numbers, > 0; a smaller one makes the items of a cluster more alike.
        noise: standard deviation of the noise of each modality, at least 0.
        seed: seed of the centres, the maps and all items.

    Raises CounterpointError for a number out of range.
    """
    if train < 2 or test < 2 or clusters < 1:
        raise CounterpointError(
            f"clustered-pairs needs train and test of at least 2 and clusters of at least 1, got {train}, {test}, {clusters}"
        )
    if not spread > 0 or not noise >= 0:
        raise CounterpointError(f"clustered-pairs needs spread > 0 and noise >= 0, got {spread} and {noise}")
    valid = checked_count("clustered-pairs", valid, test)
    rng = np.random.default_rng([2207_01426, seed])
    centres = rng.standard_normal((clusters, SHARED))
    maps = {view: rng.standard_normal((SHARED + OWN, DIM)) / np.sqrt(SHARED) for view in VIEWS}

    def columns(count: int) -> AlignedColumns:
        labels = rng.integers(clusters, size=count)
        z = np.concatenate([centres[labels], spread * rng.standard_normal((count, OWN))], 1)
        found = {
            view: (np.tanh(z @ mapped) + noise * rng.standard_normal((count, DIM))).astype(np.float32)
            for view, mapped in maps.items()
        }
        return AlignedColumns(found, labels=labels)

    trained, tested = columns(train), columns(test)
    return AlignedData(
        name="clustered-pairs",
        train=trained,
        valid=columns(valid),
        test=tested,
        modalities={view: Modality("vector", dim=DIM) for view in VIEWS},
        classes=tuple(f"cluster {number}" for number in range(clusters)),
    )
