"""Handwritten digits with captions of mostly other words: the setting of the improved baselines' claim.

The 1,797 digits that ride in scikit-learn, 8 x 8 pixels as they are. A caption is the digit's name, three stop words and
three of 60 made-up words that mean nothing, in random order: "is the kemu four of dari wopo". The digits of the test split
are fixed, 359, and so are those of the valid split, a tenth of the rest. The training pairs are `train` of what is left,
chosen by the seed, which makes the captions too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import ArrayImages, split_positions
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import SHARE, by_content, carve
from counterpoint.errors import CounterpointError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STOP = ("a", "the", "this", "is", "of", "in", "and", "with", "on", "it", "that", "here")
DISTRACTORS = tuple(
    f"{a}{b}{c}" for a in ("ba", "de", "ki", "mo", "zu") for b in ("la", "re", "ti") for c in ("p", "g", "nu", "sho")
)


def load(argument: None = None, *, train: int = 300, valid: float = SHARE, seed: int = 0) -> AlignedData:
    """`train` pairs, 359 test pairs, and a share `valid` of the other digits as valid pairs."""
    from counterpoint.data.optical import load_digits

    found = load_digits()
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)
    labels = found.target.astype(np.int64)
    rest, test = split_positions(len(labels), 0.2, labels)
    pool, watched = carve("digit-captions", rest, valid, labels[rest], by_content(grey[rest]))
    if not 2 <= train <= len(pool):
        raise CounterpointError(f"digit-captions has {len(pool)} digits to train on, asked for {train}")
    rng = np.random.default_rng([2305_08675, seed])
    order = rng.permutation(rest)
    chosen = np.sort(order[np.isin(order, pool)][:train])

    def columns(rows: NDArray[np.int64]) -> AlignedColumns:
        captions = []
        for label in labels[rows]:
            words = [NAMES[label], *rng.choice(STOP, 3, replace=False), *rng.choice(DISTRACTORS, 3, replace=False)]
            captions.append(" ".join(rng.permutation(words)))
        return AlignedColumns({"image": ArrayImages(grey[rows]), "text": captions}, labels=labels[rows])

    trained, tested = columns(chosen), columns(test)
    return AlignedData(
        name="digit-captions",
        train=trained,
        valid=columns(watched),
        test=tested,
        modalities={"image": Modality("image", size=8), "text": Modality("text")},
        classes=NAMES,
        notes=[f"digit-captions: {train} of {len(pool)} digits to train on"] if train < len(pool) else [],
    )
