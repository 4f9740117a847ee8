"""`digit-streams`: two digits side by side and the words that name them, in phases that differ in the right digit.

Phase p has the right digits 2 p and 2 p + 1, and any left digit. The phase is the domain of a pair. A digit of a split is in no
other split.

`digit-words`: one digit as 64 noisy intensities, and its word, with the digit as class, for streams of classes.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.images import ArrayImages, Indices
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import SHARE
from counterpoint.data.worlds import digits as world
from counterpoint.errors import CounterpointError

PHASES, NOISE = 5, 0.15


def load(
    argument: None = None,
    *,
    train: int = 768,
    test: int = 200,
    phases: int = PHASES,
    valid: float = SHARE,
    vectors: int = 0,
    seed: int = 0,
) -> AlignedData:
    """Draw the set (a moment).

    Args:
        argument: not used; sources share a signature.
        train: number of training pairs of a phase, at least 2.
        test: number of test pairs of a phase, and of valid pairs, at least 20.
        phases: number of phases, 1 to 5.
        valid: share of the digits outside the test split that valid pairs are made of, between 0 and 1.
        vectors: 1 gives vectors for both modalities: 128 intensities, and 20 numbers, one-hot for each word. 0 gives pictures of
            16 x 16 pixels and texts.
        seed: seed of digits and noise.

    Raises CounterpointError for a number out of range.
    """
    if train < 2 or test < 20 or not 1 <= phases <= PHASES:
        raise CounterpointError(
            f"digit-streams: train must be at least 2, test at least 20 and phases in 1..{PHASES}, got {train}, {test} and "
            f"{phases}"
        )
    labels = world.inventory()[1]
    rng = np.random.default_rng([2305_07437, seed])

    def columns(numbers: Indices, each: int) -> AlignedColumns:
        of_digit = [numbers[labels[numbers] == digit] for digit in range(10)]
        if not all(map(len, of_digit)):
            raise CounterpointError(
                f"digit-streams: with valid={valid:g} a digit has no picture in the valid split; set a larger share (?valid=0.1)"
            )
        phase = np.repeat(np.arange(phases), each)
        # Every left digit and both right ones occur equally often in a phase.
        left, right = np.tile(np.arange(each) % 10, phases), 2 * phase + np.tile(np.arange(each) // 10 % 2, phases)
        said = np.stack([left, right], 1)
        chosen = np.array([[rng.choice(of_digit[digit]) for digit in pair] for pair in said])
        pixels = world.noisy(world.scene(chosen), NOISE, rng)  # [n, 8, 16]
        if vectors:
            flags = np.eye(10, dtype=np.float32)[said].reshape(len(said), 20)
            return AlignedColumns({"image": pixels.reshape(len(said), 128), "text": flags}, domains=phase)
        squares = np.rint(np.clip(np.pad(pixels, ((0, 0), (4, 4), (0, 0))), 0, 1) * 255).astype(np.uint8)
        return AlignedColumns({"image": ArrayImages(squares), "text": world.words(said)}, domains=phase)

    trained, watched, held = world.parts("digit-streams", 0.2, valid)
    return AlignedData(
        name="digit-streams",
        train=columns(trained, train),
        test=columns(held, test),
        valid=columns(watched, test),
        modalities=(
            {"image": Modality("vector", dim=128), "text": Modality("vector", dim=20)}
            if vectors
            else {"image": Modality("image", size=16), "text": Modality("text")}
        ),
        domains=tuple(f"{world.NAMES[2 * p]}-{world.NAMES[2 * p + 1]}" for p in range(phases)),
    )


def load_words(
    argument: None = None, *, train: int = 100, test: int = 30, noise: float = 0.1, valid: float = SHARE, seed: int = 0
) -> AlignedData:
    """Draw the digits and their words (a moment).

    Args:
        argument: not used; sources share a signature.
        train: number of training digits of a class, 1 to about 125; fewer where a class has fewer.
        test: number of test digits of a class, and at most of valid ones, at least 1; fewer where a class has fewer.
        noise: standard deviation of the noise on intensities in 0..1, at least 0.
        valid: share of the digits outside the test split that are valid, between 0 and 1.
        seed: seed of digits and noise.

    Raises CounterpointError for a number out of range.
    """
    if train < 1 or test < 1 or not 0 <= noise < float("inf"):
        raise CounterpointError(
            f"digit-words: train and test must be at least 1 and noise at least 0, got {train}, {test} and {noise}"
        )
    labels = world.inventory()[1]
    rng = np.random.default_rng([2310_02699, seed])

    def columns(numbers: Indices, each: int) -> AlignedColumns:
        chosen = np.concatenate([rng.permutation(numbers[labels[numbers] == digit])[:each] for digit in range(10)])
        pixels = world.noisy(world.scene(chosen), noise, rng).reshape(len(chosen), 64).astype(np.float32)
        words = [world.NAMES[digit] for digit in labels[chosen]]
        return AlignedColumns({"digit": pixels, "text": words}, labels=labels[chosen])

    trained, watched, held = world.parts("digit-words", 0.2, valid)
    return AlignedData(
        name="digit-words",
        train=columns(trained, train),
        test=columns(held, test),
        valid=columns(watched, test),
        modalities={"digit": Modality("vector", dim=64), "text": Modality("text")},
        classes=world.NAMES,
    )
