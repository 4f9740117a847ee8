"""Sources of pairs, made from the world of digits (`data/worlds/digits.py`): digits with words, or with their other half.

    digit-captions   pictures with captions of mostly other words: data of the improved baselines' claim
    digit-pairs      two digits and the words that name them, some captions swapped: data of ALBEF's claim
    digit-halves     the upper and the lower half of a digit as vectors, or the upper as a frozen network sees it

Except in digit-halves, the test split's digits are the same for every seed.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.images import ArrayImages, Indices
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import SHARE, checked_share
from counterpoint.data.worlds import digits as world
from counterpoint.errors import CounterpointError
from counterpoint.words import counted

TEST_EACH = 5  # test pairs of each of the 100 captions of digit-pairs, and as many valid pairs
NOISE = 0.15  # standard deviation of the noise on digit-pairs, of intensities in 0..1


def load_captions(argument: None = None, *, train: int = 300, valid: float = SHARE, seed: int = 0) -> AlignedData:
    """Return `digit-captions`: digits of 8 x 8 pixels, whose captions are the digit's name among six other words.

    The test split holds 359 pairs.

    Args:
        argument: not used; sources share a signature.
        train: number of training pairs, at least 2, chosen with `seed` from the digits in no other split.
        valid: share of the digits outside the test split that form the valid split, between 0 and 1.
        seed: seed of the choice and of all captions.

    Raises CounterpointError when `train` is out of range.
    """
    pool, watched, test = world.parts("digit-captions", 0.2, valid)
    if not 2 <= train <= len(pool):
        raise CounterpointError(f"digit-captions: train must be 2 to {len(pool)} digits, got {train}")
    rng = np.random.default_rng([2305_08675, seed])
    order = rng.permutation(np.union1d(pool, watched))
    chosen = np.sort(order[np.isin(order, pool)][:train])

    def columns(numbers: Indices) -> AlignedColumns:
        truth = world.scene(numbers)
        captions = world.wordy(truth, rng)
        return AlignedColumns({"image": ArrayImages(world.grey(truth)), "text": captions}, labels=truth.labels[:, 0])

    trained, tested = columns(chosen), columns(test)
    return AlignedData(
        name="digit-captions",
        train=trained,
        valid=columns(watched),
        test=tested,
        modalities={"image": Modality("image", size=world.SIDE), "text": Modality("text")},
        classes=world.NAMES,
        notes=[f"digit-captions: {train} of {counted(len(pool), 'digit')} to train on"] if train < len(pool) else [],
    )


def load_pairs(
    argument: None = None,
    *,
    train: int = 1024,
    valid: float = SHARE,
    swapped: float = 0.0,
    vectors: int = 0,
    seed: int = 0,
) -> AlignedData:
    """Return `digit-pairs`: two noisy digits side by side and the two words that name them, 500 valid and 500 test pairs.

    Valid and test pairs have correct captions. The digits of a split are in no other split. Pictures are 16 x 16 pixels, with
    the digits in the middle rows.

    Args:
        argument: not used; sources share a signature.
        train: number of training pairs, at least 2.
        valid: share of the digits outside the test split that valid pairs are made of, between 0 and 1.
        swapped: share of training pairs, 0 to 1, that take each other's captions in a ring. Nearly all of these are wrong.
        vectors: 1 gives vectors for both modalities, for encoders of vectors: 128 intensities in about 0..1 (not clipped), and
            20 numbers, one-hot for the left and for the right word. 0 gives pictures and texts.
        seed: seed of digits, noise and swaps.

    Raises CounterpointError for a number or share out of range.
    """
    if train < 2 or not 0 <= swapped <= 1:
        raise CounterpointError(
            f"digit-pairs needs train of at least 2 and swapped in 0..1, got train {train}, swapped {swapped}"
        )
    pool, watched, held_out = world.parts("digit-pairs", 0.2, valid)
    labels = world.inventory()[1]
    rng = np.random.default_rng([2107_07651, seed])

    # Drawn from both parts, so that the test pairs do not depend on `valid`. A digit of the pool replaces each valid digit.
    drawn = rng.choice(np.union1d(pool, watched), (train, 2))
    chosen = _stand_ins(pool, watched, labels)[drawn]
    captions = labels[chosen]
    # The swapped pairs form a ring: each takes the next one's caption.
    ring = rng.permutation(train)[: round(swapped * train)]
    captions[ring] = captions[np.roll(ring, -1)]

    wanted = np.repeat(np.stack(np.divmod(np.arange(100), 10), 1), TEST_EACH, 0)

    def paired(numbers: Indices) -> Indices:
        of_digit = [numbers[labels[numbers] == digit] for digit in range(10)]
        if not all(map(len, of_digit)):
            raise CounterpointError(
                f"digit-pairs: with valid={valid:g} a digit has no picture in the valid split; set a larger share (?valid=0.1)"
            )
        return np.array([[rng.choice(of_digit[digit]) for digit in pair] for pair in wanted])

    tested = paired(held_out)

    def columns(numbers: Indices, said: Indices) -> AlignedColumns:
        pixels = world.noisy(world.scene(numbers), NOISE, rng)  # [n, 8, 16]
        if vectors:
            flags = np.eye(10, dtype=np.float32)[said].reshape(len(said), 20)
            return AlignedColumns({"image": pixels.reshape(len(numbers), 128), "text": flags})
        squares = np.rint(np.clip(np.pad(pixels, ((0, 0), (4, 4), (0, 0))), 0, 1) * 255).astype(np.uint8)
        return AlignedColumns({"image": ArrayImages(squares), "text": world.words(said)})

    trained, held = columns(chosen, captions), columns(tested, wanted)
    return AlignedData(
        name="digit-pairs",
        train=trained,
        valid=columns(paired(watched), wanted),
        test=held,
        modalities=(
            {"image": Modality("vector", dim=128), "text": Modality("vector", dim=20)}
            if vectors
            else {"image": Modality("image", size=16), "text": Modality("text")}
        ),
        notes=[f"digit-pairs: {len(ring)} of {train} training captions are swapped"] if len(ring) else [],
    )


def _stand_ins(pool: Indices, watched: Indices, labels: Indices) -> Indices:
    """Return [digits] numbers: each digit itself, but for a digit of the valid split one of the pool of the same class."""
    found = np.arange(len(labels))
    for digit in range(10):
        mine, others = watched[labels[watched] == digit], pool[labels[pool] == digit]
        found[mine] = others[np.arange(len(mine)) % len(others)]
    return found


def load_halves(
    argument: None = None,
    *,
    train: int = 0,
    valid: float = SHARE,
    test: int = 397,
    labelled: int = 0,
    whole: int = 0,
    seed: int = 0,
) -> AlignedData:
    """Return `digit-halves`: `top` and `bottom` of a digit, two views that share the digit's class, 32 intensities each.

    Args:
        argument: not used; sources share a signature.
        train: number of training pairs; 0 for all that remain.
        valid: share, between 0 and 1, of the remaining digits of each class that form the valid split.
        test: number of test pairs, at least 1.
        labelled: number of top halves that train a frozen tower; 0 for none. The tower is a small network that classifies the
            digit. Its training halves are not among the pairs. Then `top` is the tower's last layer before the classes, 32
            numbers. So an existing model can be distilled into another modality.
        whole: 1 gives the whole digit in both modalities, `first` and `second`, for two encoders of equal input. 0 gives halves.
        seed: seed of the splits and of the tower.

    Raises CounterpointError for numbers that ask for more digits than there are, and for `whole` with `labelled`.
    """
    everything = world.scene(np.arange(len(world.inventory()[1])))
    labels = everything.labels[:, 0]
    checked_share("digit-halves", valid)
    if test < 1 or min(train, labelled) < 0 or train + test + labelled > len(labels):
        raise CounterpointError(
            f"digit-halves has {counted(len(labels), 'digit')}; train {train} + test {test} + labelled {labelled} must be at "
            "least 0 + 1 + 0 and at most that number"
        )
    if whole and labelled:
        raise CounterpointError("digit-halves: the tower of labelled=N encodes top halves; remove whole=1 or labelled")
    order = np.random.default_rng([2405_18570, seed]).permutation(len(labels))
    test_rows, rest = np.split(order, [test])
    tower_rows, rest = np.split(rest, [labelled])
    # The last ones of each class are valid; training digits come from the front.
    of_class = [np.flatnonzero(labels[rest] == digit) for digit in range(len(world.NAMES))]
    last = np.sort(np.concatenate([rows[len(rows) - round(valid * len(rows)) :] for rows in of_class]))
    watched, rest = rest[last], np.delete(rest, last)
    if not len(watched) or not len(rest) or train > len(rest):
        raise CounterpointError(
            f"digit-halves has {counted(len(watched), 'digit')} for the valid split (?valid={valid:g}) and {len(rest)} for "
            "training; "
            f"train is {train or 'at least 1'}. Ask for fewer training, test or labelled digits, or set another share"
        )
    notes = []
    if whole:
        flat = world.intensity(everything).reshape(len(labels), -1)
        columns = {"first": flat, "second": flat}
    else:
        columns = dict(zip(("top", "bottom"), world.halves(everything), strict=True))
    if labelled:
        columns["top"], right = world.tower(everything, tower_rows, test_rows, seed)
        notes.append(f"the tower classifies {right:.0%} of the test digits correctly from their top halves")

    def split(rows: Indices) -> AlignedColumns:
        return AlignedColumns({name: values[rows] for name, values in columns.items()}, labels[rows])

    return AlignedData(
        "digit-halves",
        split(rest[: train or None]),
        split(watched),
        split(test_rows),
        {name: Modality("vector", dim=values.shape[1]) for name, values in columns.items()},
        classes=world.NAMES,
        notes=notes,
    )
