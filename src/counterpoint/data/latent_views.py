"""`latent-views`: synthetic items in three modalities that share few hidden causes: data of M3CoL's claim.

A hidden z of 8 standard normal numbers decides the class: the nearest of 5 random centres. Each modality is the sum of three
vectors of 120 numbers:

    1. tanh of a random map of z;
    2. 1.3 times tanh of a random map of 12 hidden numbers that only this modality depends on;
    3. noise of standard deviation 0.5.

Training items are few, so a model must find the causes that the modalities share.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import checked_count
from counterpoint.errors import CounterpointError

SHARED, PRIVATE, CLASSES = 8, 12, 5
DIM = 120
VIEWS = ("first", "second", "third")


def load(argument: None = None, *, train: int = 240, valid: int = -1, test: int = 800, seed: int = 0) -> AlignedData:
    """Draw training, valid and test items from one set of centres and maps.

    Args:
        argument: not used; sources share a signature.
        train: number of training items, at least 2.
        valid: number of valid items; -1 for as many as test items.
        test: number of test items, at least 2.
        seed: seed of the centres, the maps and all items.

    Raises CounterpointError for a number out of range.
    """
    if train < 2 or test < 2:
        raise CounterpointError(f"latent-views needs train and test of at least 2, got {train} and {test}")
    valid = checked_count("latent-views", valid, test)
    rng = np.random.default_rng([2409_17777, seed])
    centres = rng.standard_normal((CLASSES, SHARED))
    maps = {
        view: tuple(rng.standard_normal((hidden, DIM)) / np.sqrt(hidden) for hidden in (SHARED, PRIVATE))
        for view in VIEWS
    }

    def columns(count: int) -> AlignedColumns:
        z = rng.standard_normal((count, SHARED))
        labels = ((z[:, None] - centres) ** 2).sum(2).argmin(1)
        found = {}
        for view, (shared, private) in maps.items():
            own = rng.standard_normal((count, PRIVATE))
            noise = 0.5 * rng.standard_normal((count, DIM))
            found[view] = (np.tanh(z @ shared) + 1.3 * np.tanh(own @ private) + noise).astype(np.float32)
        return AlignedColumns(found, labels=labels)

    trained, tested = columns(train), columns(test)
    return AlignedData(
        name="latent-views",
        train=trained,
        valid=columns(valid),
        test=tested,
        modalities={view: Modality("vector", dim=DIM) for view in VIEWS},
        classes=tuple(f"class {number}" for number in range(CLASSES)),
    )
