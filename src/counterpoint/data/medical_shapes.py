"""`medical-shapes`: pictures of four synthetic kinds of imaging with contradictory rules, each with a mask; natural ones without.

    domain          target                              must be ignored
    bright-discs    bright discs on a dark ground       darker discs
    dark-discs      dark discs on a bright ground       brighter discs
    curves          thin bright curves                  a coarse texture
    blobs           many small blobs                    multiplicative speckle

Natural pictures show discs, curves and blobs of all tones in colour. They have no domain and no mask; only training has them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.dense import IGNORE, ArrayScenes, DenseData
from counterpoint.data.images import checked_size
from counterpoint.data.valid import checked_count
from counterpoint.errors import CounterpointError, unknown

DOMAINS = ("bright-discs", "dark-discs", "curves", "blobs")
Grey = NDArray[np.float64]
Mask = NDArray[np.bool_]


def load(
    argument: None = None,
    *,
    task: str = "dense",
    train: int = 100,
    natural: int = 200,
    valid: int = -1,
    test: int = 40,
    size: int = 32,
    without: str = "",
    seed: int = 0,
) -> DenseData:
    """Draw the set (a second).

    Args:
        argument: not used; sources share a signature.
        task: "dense", or "views" to learn from the pictures; the result is the same.
        train: training pictures of each domain, at least 2.
        natural: natural training pictures, at least 0.
        valid: valid pictures of each domain; -1 for half as many as test pictures.
        test: test pictures of each domain, at least 2.
        size: height and width in pixels, 8 to 4096.
        without: a domain to leave out, such as one whose controller is added later. Default: none.
        seed: seed of the pictures, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    checked_size(size)
    if min(train, test) < 2 or natural < 0 or seed < 0:
        raise CounterpointError(
            f"medical-shapes: train and test are at least 2, natural and seed at least 0; got {train=}, {test=}, {natural=}, "
            f"{seed=}"
        )
    if without and without not in DOMAINS:
        raise unknown("domain", without, DOMAINS)
    kept = tuple(name for name in DOMAINS if name != without)
    splits = []
    for number, count in enumerate((train, checked_count("medical-shapes", valid, max(1, test // 2)), test)):
        pixels, masks, of = [], [], []
        for name in kept:
            # A domain's pictures do not depend on the others, so that they stay when one is left out.
            rng = np.random.default_rng([2407_14153, seed, number, DOMAINS.index(name)])
            drawn = [_DRAWN[name](rng, size) for _ in range(count)]
            pixels += [np.repeat(_bytes(picture, rng)[..., None], 3, 2) for picture, _ in drawn]
            masks += [mask.astype(np.uint8) for _, mask in drawn]
            of += [kept.index(name)] * count
        if number == 0:
            rng = np.random.default_rng([2407_14153, seed, 9])
            pixels += [np.stack([_bytes(part, rng) for part in _natural(rng, size)], 2) for _ in range(natural)]
            masks += [np.full((size, size), IGNORE, np.uint8)] * natural
            of += [-1] * natural
        splits.append(ArrayScenes(np.stack(pixels), np.stack(masks), domains=np.array(of, np.int64)))
    regions = ("background", "target")
    return DenseData("medical-shapes", splits[0], splits[1], splits[2], (), size, regions=regions, domains=kept)


def _bytes(picture: Grey, rng: np.random.Generator) -> NDArray[np.uint8]:
    return np.rint(255 * np.clip(picture + rng.normal(0, 0.03, picture.shape), 0, 1)).astype(np.uint8)


def _disc(rng: np.random.Generator, size: int, least: float, most: float) -> Mask:
    at = (np.arange(size) + 0.5) / size
    place, radius = rng.uniform(0.1, 0.9, 2), rng.uniform(least, most)
    return (at[:, None] - place[0]) ** 2 + (at[None, :] - place[1]) ** 2 < radius**2


def _curve(rng: np.random.Generator, size: int) -> Mask:
    """Return a wave of about a thirtieth of the side's thickness, across the picture."""
    at = (np.arange(size) + 0.5) / size
    height = rng.uniform(0.2, 0.8) + rng.uniform(0.05, 0.2) * np.sin(rng.uniform(3, 8) * at + rng.uniform(0, 6.3))
    found = np.abs(at[:, None] - height[None, :]) < 0.035
    return found if rng.random() < 0.5 else found.T


def _discs(rng: np.random.Generator, size: int, ground: float, target: float, other: float) -> tuple[Grey, Mask]:
    picture, mask = np.full((size, size), ground + rng.normal(0, 0.03)), np.zeros((size, size), bool)
    for _ in range(rng.integers(1, 4)):
        picture[_disc(rng, size, 0.08, 0.16)] = other + rng.normal(0, 0.03)
    for _ in range(rng.integers(1, 4)):
        disc = _disc(rng, size, 0.1, 0.2)
        picture[disc], mask[disc] = target + rng.normal(0, 0.03), True
    return picture, mask


def _bright_discs(rng: np.random.Generator, size: int) -> tuple[Grey, Mask]:
    return _discs(rng, size, 0.4, 0.65, 0.15)


def _dark_discs(rng: np.random.Generator, size: int) -> tuple[Grey, Mask]:
    return _discs(rng, size, 0.6, 0.35, 0.85)


def _curves(rng: np.random.Generator, size: int) -> tuple[Grey, Mask]:
    coarse = rng.random((size // 4 + 1, size // 4 + 1)).repeat(4, 0).repeat(4, 1)[:size, :size]
    mask = np.zeros((size, size), bool)
    for _ in range(rng.integers(1, 4)):
        mask |= _curve(rng, size)
    return np.where(mask, 0.7, 0.3 + 0.3 * coarse), mask


def _blobs(rng: np.random.Generator, size: int) -> tuple[Grey, Mask]:
    mask = np.zeros((size, size), bool)
    for _ in range(rng.integers(6, 13)):
        mask |= _disc(rng, size, 0.04, 0.08)
    return np.where(mask, 0.6, 0.35) * rng.gamma(12, 1 / 12, (size, size)), mask


def _natural(rng: np.random.Generator, size: int) -> list[Grey]:
    """Return the channels of a picture of shapes of all kinds and tones."""
    tones = rng.random(3)
    channels = [np.full((size, size), tone) for tone in tones]
    for _ in range(rng.integers(3, 9)):
        mask = _curve(rng, size) if rng.random() < 0.3 else _disc(rng, size, 0.04, 0.25)
        for channel, tone in zip(channels, rng.random(3), strict=True):
            channel[mask] = tone
    return channels


_DRAWN = {"bright-discs": _bright_discs, "dark-discs": _dark_discs, "curves": _curves, "blobs": _blobs}
