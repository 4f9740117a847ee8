"""`query-digits`: digits as a search by class name returns them, with captions: data of CAPro's claim.

Two classes share their query, 0 with 1, 2 with 3, and so on. So a training picture often has the label of the other class. Some
pictures show no digit. A caption has words of the class that its picture shows, among other words. Captions may be of another
class, or missing. Each class has a definition in its own words. Valid and test pictures are digits under their true labels.
The attribute `truth` has the true classes, -1 where a picture shows no digit.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.images import ArrayImages, ImageData, Indices, WebTexts, checked_size
from counterpoint.data.valid import SHARE
from counterpoint.data.worlds import digits as world
from counterpoint.errors import DataError

WORDS = 8  # of each class
SAID = 3  # of them in a caption, and as many others
DEFINED = 5  # of them in a definition


def load(
    argument: None = None,
    *,
    train: int = 0,
    flipped: float = 0.4,
    others: float = 0.05,
    misplaced: float = 0.15,
    missing: float = 0.25,
    size: int = 8,
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
        held_out: share of the digits in the test split, between 0 and 1, the same for every class.
        valid: share of the other digits in the valid split, between 0 and 1, the same for every class.
        seed: seed of the choice of digits, labels and captions.

    Raises DataError for a number or share out of range.
    """
    checked_size(size)
    shares = {"flipped": flipped, "others": others, "misplaced": misplaced, "missing": missing}
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

    pool = [
        f"{a}{b}"
        for a in ("ra", "fi", "lo", "tu", "me", "so", "ni", "ha")
        for b in ("ba", "ka", "zo", "vi", "pel", "dur", "gan", "mi")
    ]
    pool += [f"{word}s" for word in pool]
    senses = rng.permutation(np.array(pool))[: 10 * WORDS].reshape(10, WORDS)

    def caption(shown: int) -> str:
        if rng.random() < missing:
            return ""
        shown = int(rng.integers(10)) if rng.random() < misplaced else shown
        said = [*rng.choice(world.STOP, SAID, replace=False), *rng.choice(world.DISTRACTORS, SAID, replace=False)]
        if shown >= 0:
            said = [*said, *rng.choice(senses[shown], SAID, replace=False)]
        return " ".join(rng.permutation(said))

    captions = tuple(caption(int(shown)) for shown in truth)
    definitions = tuple(
        " ".join([name, *rng.choice(words, DEFINED, replace=False)])
        for name, words in zip(world.NAMES, senses, strict=True)
    )

    def images(numbers: Indices) -> ArrayImages:
        scene = world.scene(numbers)
        return ArrayImages(world.enlarged(scene, size), scene.labels[:, 0])

    grey = np.rint(pictures * (255 / world.SHADES)).astype(np.uint8)
    return ImageData(
        name="query-digits",
        train=ArrayImages(world.resized(grey, size), found),
        valid=images(parts.valid),
        test=images(parts.test),
        classes=world.NAMES,
        size=size,
        attributes={"truth": (truth, labels[parts.valid], labels[parts.test])},
        texts=WebTexts(captions, definitions),
    )
