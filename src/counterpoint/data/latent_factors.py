"""`latent-factors`: pictures of 8 x 8 pixels made from known causes, in two sets: data of SepCLR's claim.

Each picture has common causes c, 3 uniform numbers in -1..1. A target has salient causes s too, 2 such numbers; a background
has s = 0. Its 64 pixels are tanh(W2 tanh(W1 [c; s])), from -1 (black) to 1 (white):

    W1 [5, 48]      standard normal numbers times 1.2
    W2 [48, 64]     standard normal numbers times 1.5 / sqrt(48)

The domains are `background` and `target`. The class is the octant of c, the attribute `salient` the quadrant of s, -1 for a
background. The factors `common_causes` and `salient_causes` are c and s. The views recipe `latent-factors` adds noise of 0.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from counterpoint.data.images import ArrayImages, ImageData, Indices
from counterpoint.data.valid import checked_count
from counterpoint.errors import DataError

COMMON, SALIENT, HIDDEN, SIDE = 3, 2, 48, 8


def load(argument: None = None, *, train: int = 8000, valid: int = -1, test: int = 1000, seed: int = 0) -> ImageData:
    """Draw the set; every second picture of a split is a target.

    Args:
        argument: not used; sources share a signature.
        train: number of training pictures, at least 4.
        valid: number of valid pictures; -1 for as many as `test`.
        test: number of test pictures, at least 4.
        seed: seed of both matrices and of all causes.

    Raises DataError for numbers out of range.
    """
    if min(train, test) < 4:
        raise DataError(f"latent-factors: train and test must be at least 4, got {train=}, {test=}")
    valid = checked_count("latent-factors", valid, test)
    rng = np.random.default_rng([2402_11928, seed])
    first = 1.2 * rng.standard_normal((COMMON + SALIENT, HIDDEN))
    second = 1.5 / np.sqrt(HIDDEN) * rng.standard_normal((HIDDEN, SIDE * SIDE))

    def drawn(count: int) -> tuple[ArrayImages, np.ndarray, np.ndarray, Indices]:
        target = np.arange(count) % 2
        causes = rng.uniform(-1, 1, (count, COMMON + SALIENT))
        causes[target == 0, COMMON:] = 0
        value = np.tanh(np.tanh(causes @ first) @ second)
        pixels = np.rint(127.5 * (1 + value)).astype(np.uint8).reshape(-1, SIDE, SIDE)
        octant, quadrant = ((part > 0) @ (2 ** np.arange(part.shape[1])) for part in np.split(causes, [COMMON], axis=1))
        c, s = np.split(causes.astype(np.float32), [COMMON], axis=1)
        images = ArrayImages(pixels, octant.astype(np.int64), domains=target)
        return images, c, s, np.where(target == 1, quadrant, -1).astype(np.int64)

    # Test before valid: the number of valid pictures does not change the others.
    trained, tested, watched = (drawn(count) for count in (train, test, valid))

    def of(part: int) -> tuple[Any, Any, Any]:
        return trained[part], watched[part], tested[part]

    return ImageData(
        name="latent-factors",
        train=trained[0],
        valid=watched[0],
        test=tested[0],
        classes=tuple(f"octant {number}" for number in range(2**COMMON)),
        size=SIDE,
        domains=("background", "target"),
        attributes={"salient": of(3)},
        factors={"common_causes": of(1), "salient_causes": of(2)},
    )
