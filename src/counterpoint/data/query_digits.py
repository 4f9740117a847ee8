"""`query-digits` and `query-canvases`: digits as a search by class name returns them, with captions: data of CAPro's claim.

Two classes share their query, 0 with 1, 2 with 3, and so on. So a training picture often has the label of the other class. Some
pictures show no digit. A caption has words of the class that its picture shows, among other words. Captions may be of another
class, or missing. Each class has a definition in its own words. Valid and test pictures are digits under their true labels.
The attribute `truth` has the true classes, -1 where a picture shows no digit.

A picture of `query-canvases` shows one to three digits, so it has several labels (`tags`). Each label of a training picture may be
that of the other class with the same query. The factor `truth` has the true labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from counterpoint.data.images import ArrayImages, ImageData, Indices, Tags, WebTexts, checked_size
from counterpoint.data.valid import SHARE
from counterpoint.data.worlds import digits as world
from counterpoint.errors import DataError

WORDS = 8  # of each class
SAID = 3  # of them in a caption, and as many others
DEFINED = 5  # of them in a definition
SHOWN = 3  # largest number of digits in a picture of several labels


def load(
    argument: None = None,
    *,
    train: int = 0,
    flipped: float = 0.4,
    others: float = 0.05,
    misplaced: float = 0.15,
    missing: float = 0.25,
    size: int = 8,
    unknown: float = 0.0,
    held_out: float = 0.3,
    valid: float = SHARE,
    seed: int = 0,
) -> ImageData:
    """Draw the set.

    Args:
        argument: not used; sources share a signature.
        train: number of training digits, at least 10, drawn with `seed`; 0 for all.
        flipped: share of training digits under the label of the class with the same query, 0 to 1.
        others: number of pictures without a digit, as a share of the training digits, 0 to 1; their labels are random.
        misplaced: share of captions of a random class, 0 to 1.
        missing: share of captions that are missing, 0 to 1.
        size: height and width in pixels, 8 to 4096.
        unknown: number of valid and test pictures without a digit, as a share of those with one, 0 to 1; their label is -1.
        held_out: share of the digits in the test split, between 0 and 1, the same for every class.
        valid: share of the other digits in the valid split, between 0 and 1, the same for every class.
        seed: seed of the choice of digits, labels and captions.

    Raises DataError for a number or share out of range.
    """
    checked_size(size)
    shares = {"flipped": flipped, "others": others, "misplaced": misplaced, "missing": missing, "unknown": unknown}
    if not 0 < held_out < 1 or not all(0 <= share <= 1 for share in shares.values()):
        raise DataError(
            f"query-digits: held_out lies between 0 and 1, and {', '.join(shares)} in 0..1; got {held_out=}, {shares}"
        )
    parts = world.parts("query-digits", held_out, valid)
    if train and not 10 <= train <= len(parts.train):
        raise DataError(f"query-digits: train must be 10 to {len(parts.train)} digits, or 0 for all, got {train}")
    rng = np.random.default_rng([2310_09761, seed])
    drawn = rng.permutation(parts.train)[: train or None]
    shades, labels = world.inventory()
    extra = round(others * len(drawn))
    pictures = np.concatenate([shades[drawn], world.shuffled(shades[rng.choice(drawn, extra)], rng)])
    truth = np.concatenate([labels[drawn], np.full(extra, -1)])
    found = np.where(rng.random(len(truth)) < flipped, truth ^ 1, truth)
    found = np.where(truth < 0, rng.integers(10, size=len(truth)), found)
    order = rng.permutation(len(truth))
    pictures, truth, found = pictures[order], truth[order], found[order]

    captions, definitions = _texts(rng, [[int(shown)] if shown >= 0 else [] for shown in truth], misplaced, missing)
    apart = np.random.default_rng([2310_09761, seed, 1])

    def images(numbers: Indices) -> ArrayImages:
        scene = world.scene(numbers)
        pixels, classes = world.enlarged(scene, size), scene.labels[:, 0]
        more = round(unknown * len(numbers))
        if more:
            none = np.rint(world.shuffled(shades[apart.choice(numbers, more)], apart) * (255 / world.SHADES)).astype(
                np.uint8
            )
            pixels, classes = np.concatenate([pixels, world.resized(none, size)]), np.append(classes, np.full(more, -1))
        return ArrayImages(pixels, classes)

    grey = np.rint(pictures * (255 / world.SHADES)).astype(np.uint8)
    watched, tested = images(parts.valid), images(parts.test)
    assert watched.labels is not None
    assert tested.labels is not None
    return ImageData(
        name="query-digits",
        train=ArrayImages(world.resized(grey, size), found),
        valid=watched,
        test=tested,
        classes=world.NAMES,
        size=size,
        attributes={"truth": (truth, watched.labels, tested.labels)},
        texts=WebTexts(captions, definitions),
    )


def load_canvases(
    argument: None = None,
    *,
    train: int = 1000,
    test: int = 400,
    flipped: float = 0.4,
    misplaced: float = 0.15,
    missing: float = 0.25,
    noise: float = 0.1,
    held_out: float = 0.3,
    valid: float = SHARE,
    seed: int = 0,
) -> ImageData:
    """Draw pictures of one to three digits in 2 x 2 cells, 16 pixels wide, with several labels each.

    Args:
        argument: not used; sources share a signature.
        train: number of training pictures, at least 10.
        test: number of valid and of test pictures, at least 2.
        flipped: share of labels of training pictures that are those of the class with the same query, 0 to 1.
        misplaced: share of captions of a random class, 0 to 1.
        missing: share of captions that are missing, 0 to 1.
        noise: standard deviation of the noise, in intensities of 0..1.
        held_out: share of the digits that test pictures are made of, between 0 and 1, the same for every class.
        valid: share of the other digits that valid pictures are made of, between 0 and 1, the same for every class.
        seed: seed of digits, cells, labels and captions.

    Raises DataError for a number or share out of range.
    """
    shares = {"flipped": flipped, "misplaced": misplaced, "missing": missing}
    if train < 10 or test < 2 or noise < 0 or not 0 < held_out < 1 or not all(0 <= x <= 1 for x in shares.values()):
        raise DataError(
            f"query-canvases: train is at least 10, test at least 2, and noise not negative; held_out lies between 0 and 1, "
            f"{', '.join(shares)} in 0..1. Got {train=}, {test=}, {noise=}, {held_out=}, {shares}"
        )
    parts = world.parts("query-canvases", held_out, valid)
    classes = world.inventory()[1]
    rng = np.random.default_rng([2310_09761, seed, 2])

    def canvases(pool: Indices, count: int) -> tuple[ArrayImages, Indices]:
        numbers = rng.choice(pool, (count, SHOWN))
        cells = rng.random((count, 4)).argsort(1)[:, :SHOWN]
        # A digit beyond a picture's number is the first one again, in the same cell.
        shown = np.arange(SHOWN) < rng.integers(1, SHOWN, count, endpoint=True)[:, None]
        numbers, cells = np.where(shown, numbers, numbers[:, :1]), np.where(shown, cells, cells[:, :1])
        present = np.zeros((count, len(world.NAMES)), np.int64)
        present[np.arange(count)[:, None], classes[numbers]] = 1
        return ArrayImages(world.canvases(world.scene(numbers), cells, 2, noise, rng), classes[numbers[:, 0]]), present

    (trained, truth), (watched, second), (tested, third) = (
        canvases(pool, count) for pool, count in zip(parts, (train, test, test), strict=True)
    )
    found = np.zeros_like(truth)
    rows, shown = truth.nonzero()
    found[rows, np.where(rng.random(len(rows)) < flipped, shown ^ 1, shown)] = 1
    captions, definitions = _texts(rng, [list(np.flatnonzero(row)) for row in truth], misplaced, missing)
    return ImageData(
        name="query-canvases",
        train=ArrayImages(trained.pixels, found.argmax(1)),
        valid=watched,
        test=tested,
        classes=world.NAMES,
        size=2 * world.SIDE,
        factors={"truth": (truth.astype(np.float32), second.astype(np.float32), third.astype(np.float32))},
        tags=Tags(world.NAMES, found, second, third),
        texts=WebTexts(captions, definitions),
    )


def _texts(
    rng: np.random.Generator, shown: Sequence[Sequence[int]], misplaced: float, missing: float
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw a caption for each list of shown classes, and a definition of each class."""
    pool = [
        f"{a}{b}"
        for a in ("ra", "fi", "lo", "tu", "me", "so", "ni", "ha")
        for b in ("ba", "ka", "zo", "vi", "pel", "dur", "gan", "mi")
    ]
    pool += [f"{word}s" for word in pool]
    senses = rng.permutation(np.array(pool))[: 10 * WORDS].reshape(10, WORDS)

    def caption(own: Sequence[int]) -> str:
        if rng.random() < missing:
            return ""
        own = [int(rng.integers(10))] if rng.random() < misplaced else own
        said = [*rng.choice(world.STOP, SAID, replace=False), *rng.choice(world.DISTRACTORS, SAID, replace=False)]
        for number in own:
            said = [*said, *rng.choice(senses[number], SAID, replace=False)]
        return " ".join(rng.permutation(said))

    captions = tuple(caption(own) for own in shown)
    definitions = tuple(
        " ".join([name, *rng.choice(words, DEFINED, replace=False)])
        for name, words in zip(world.NAMES, senses, strict=True)
    )
    return captions, definitions
