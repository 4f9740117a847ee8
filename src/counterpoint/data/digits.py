"""Sources made from the world of digits (`data/worlds/digits.py`): each chooses digits, renders them and hands over a form.

    digits           pictures with labels, scaled up; splits, cuts and long tails
    digit-patterns   pictures of a digit and a pattern, of which plain contrast learns the easy one: MCL's claim
    digit-captions   pictures with captions of mostly other words: the improved baselines' claim
    digit-pairs      two digits and the words that name them, some captions swapped: ALBEF's claim
    digit-halves     the upper and the lower half of a digit as vectors, or the upper as a frozen network sees it

The test split holds the same digits whatever the seed, but for digit-halves.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.images import ArrayImages, ImageData, Indices, checked_size, long_tailed
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import SHARE, checked_share
from counterpoint.data.worlds import digits as world
from counterpoint.errors import CounterpointError, DataError

TEST_EACH = 5  # test pairs of each of the 100 captions of digit-pairs, and as many valid pairs
NOISE = 0.15  # standard deviation of the noise on digit-pairs, of intensities in 0..1


def load(
    argument: None = None,
    *,
    size: int = 32,
    held_out: float = 0.2,
    valid: float = SHARE,
    train: int = 0,
    labelled: int = 0,
    imbalance: float = 0.0,
    seed: int = 0,
) -> ImageData:
    """Return `digits`, at `size` pixels; the test split is the same at every size.

    Args:
        argument: not used; sources share a signature.
        size: height and width.
        held_out: share of the digits in the test split, the same for every class.
        valid: share of the other digits in the valid split, the same for every class.
        train: only so many training digits, drawn with `seed`; 0 for all.
        labelled: how many of those that could be drawn have a label for evaluators (neighbours, linear probe), the ones
            that are trained on first; 0 for the training digits.
        imbalance: make the training split long-tailed, so many times more zeros than nines (see `images.long_tailed`); 0 leaves
            it as it is.
        seed: of both draws.
    """
    checked_size(size)
    if not 0 < held_out < 1:
        raise DataError(f"digits: held_out is a share between 0 and 1, got {held_out}")
    chosen, watched, test = world.parts("digits", held_out, valid)
    if imbalance:
        chosen = chosen[long_tailed(world.scene(chosen).labels[:, 0], imbalance, seed)]
    for name, number in (("train", train), ("labelled", labelled)):
        if number and not 2 <= number <= len(chosen):
            raise DataError(f"digits: {name} is 2 to {len(chosen)} digits, got {number}")
    drawn = np.random.default_rng(seed).permutation(chosen)
    known = np.sort(drawn[:labelled])
    if train:
        chosen = np.sort(drawn[:train])

    def images(numbers: Indices) -> ArrayImages:
        truth = world.scene(numbers)
        return ArrayImages(world.enlarged(truth, size), truth.labels[:, 0])

    return ImageData(
        name="digits",
        train=images(chosen),
        valid=images(watched),
        test=images(test),
        bank=images(known) if labelled else None,
        classes=world.NAMES,
        size=size,
    )


def load_patterns(
    argument: None = None, *, patterns: int = 200, held_out: float = 0.4, valid: float = SHARE, seed: int = 0
) -> ImageData:
    """Return `digit-patterns`: two features in one picture, of which plain contrast learns the easy one.

    The first channel is a digit, the second one of `patterns` random black-and-white patterns, drawn independently of the digit;
    the third is empty. The recipe of views `digit-patterns` shifts, cuts and blurs the first alone: the pattern is the same in
    both views, easy and shared. The label is the digit; the pattern is the attribute `pattern`.

    Args:
        argument: not used; sources share a signature.
        patterns: how many there are; each digit gets one at random, in the test split anew.
        held_out: share of the digits in the test split, the same for every class.
        valid: share of the other digits in the valid split, the same for every class.
        seed: of the patterns and of who gets which.
    """
    if patterns < 2 or not 0 < held_out < 1:
        raise DataError("digit-patterns: at least 2 patterns, and held_out a share between 0 and 1")
    parts = world.parts("digit-patterns", held_out, valid)
    rng = np.random.default_rng(seed)
    shapes = (rng.random((patterns, world.SIDE, world.SIDE)) < 0.5).astype(np.uint8) * 255
    which = rng.integers(0, patterns, sum(map(len, parts)))

    def images(numbers: Indices) -> ArrayImages:
        truth = world.scene(numbers)
        return ArrayImages(world.over_patterns(truth, shapes[which[numbers]]), truth.labels[:, 0])

    return ImageData(
        name="digit-patterns",
        train=images(parts.train),
        valid=images(parts.valid),
        test=images(parts.test),
        classes=world.NAMES,
        size=world.SIDE,
        attributes={"pattern": (which[parts.train], which[parts.valid], which[parts.test])},
    )


def load_captions(argument: None = None, *, train: int = 300, valid: float = SHARE, seed: int = 0) -> AlignedData:
    """Return `digit-captions`: digits, 8 x 8, whose captions are the digit's name among six other words.

    Args:
        argument: not used; sources share a signature.
        train: how many training pairs, chosen with `seed` of those that are neither in the valid nor in the test split, 359.
        valid: share of the digits outside the test split in the valid split.
        seed: of the choice, and of all captions.
    """
    pool, watched, test = world.parts("digit-captions", 0.2, valid)
    if not 2 <= train <= len(pool):
        raise CounterpointError(f"digit-captions has {len(pool)} digits to train on, asked for {train}")
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
        notes=[f"digit-captions: {train} of {len(pool)} digits to train on"] if train < len(pool) else [],
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

    Valid and test pairs are clean, each made of digits that no other split has. Pictures are 16 x 16, the digits in their middle
    rows.

    Args:
        argument: not used; sources share a signature.
        train: how many training pairs, at least 2.
        valid: share of the digits that are not tested on of which valid pairs are made.
        swapped: share of training pairs whose captions are handed on among themselves, so that nearly all of them are wrong.
        vectors: 1 gives both sides as vectors, for encoders of vectors: 128 intensities in about 0..1 (not clipped), and 20
            numbers that are 1 for the left and the right word. 0 gives pictures and texts.
        seed: of digits, noise and swaps.
    """
    if train < 2 or not 0 <= swapped <= 1:
        raise CounterpointError(
            f"digit-pairs needs train of at least 2 and swapped in 0..1, got train {train}, swapped {swapped}"
        )
    pool, watched, held_out = world.parts("digit-pairs", 0.2, valid)
    labels = world.inventory()[1]
    rng = np.random.default_rng([2107_07651, seed])

    # Drawn from all, so that the test pairs do not depend on the valid ones; a digit of the pool stands in for each of these.
    drawn = rng.choice(np.union1d(pool, watched), (train, 2))
    chosen = _stand_ins(pool, watched, labels)[drawn]
    captions = labels[chosen]
    # A ring of the chosen ones: each takes the next one's caption.
    ring = rng.permutation(train)[: round(swapped * train)]
    captions[ring] = captions[np.roll(ring, -1)]

    wanted = np.repeat(np.stack(np.divmod(np.arange(100), 10), 1), TEST_EACH, 0)

    def paired(numbers: Indices) -> Indices:
        of_digit = [numbers[labels[numbers] == digit] for digit in range(10)]
        if not all(map(len, of_digit)):
            raise CounterpointError(
                f"digit-pairs: valid={valid:g} leaves a digit without a picture in the valid split; ask for more (?valid=0.1)"
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
    """[digits] the digit itself, or one of the pool of the same class in place of each of the valid split."""
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
    """Return `digit-halves`: `top` and `bottom` of a digit, two views that share what the digit is, 32 intensities each.

    Args:
        argument: not used; sources share a signature.
        train: how many pairs to train on; 0 for all that are left.
        valid: share of each class, of the digits that are left, in the valid split.
        test: how many test pairs.
        labelled: where not 0, the top halves come as a frozen tower sees them: a small network learns to name the digit from so
            many top halves, which are not among the pairs, and `top` is its last layer before the names, 32 numbers. That is the
            setting of a model that exists and is to be copied into another modality.
        whole: 1 gives the whole digit in both modalities, `first` and `second`: two encoders of one and the same thing.
        seed: of who is in which split, and of the tower.
    """
    everything = world.scene(np.arange(len(world.inventory()[1])))
    labels = everything.labels[:, 0]
    checked_share("digit-halves", valid)
    if test < 1 or min(train, labelled) < 0 or train + test + labelled > len(labels):
        raise CounterpointError(
            f"digit-halves has {len(labels)} digits; train {train} + test {test} + labelled {labelled} must be at "
            "least 0 + 1 + 0 and no more than that"
        )
    if whole and labelled:
        raise CounterpointError("digit-halves: the tower of labelled=N sees top halves; leave whole=1 away")
    order = np.random.default_rng([2405_18570, seed]).permutation(len(labels))
    test_rows, rest = np.split(order, [test])
    tower_rows, rest = np.split(rest, [labelled])
    # The last ones of each class: training digits come from the front.
    of_class = [np.flatnonzero(labels[rest] == digit) for digit in range(len(world.NAMES))]
    last = np.sort(np.concatenate([rows[len(rows) - round(valid * len(rows)) :] for rows in of_class]))
    watched, rest = rest[last], np.delete(rest, last)
    if not len(watched) or not len(rest) or train > len(rest):
        raise CounterpointError(
            f"digit-halves has {len(watched)} digits for the valid split (?valid={valid:g}) and {len(rest)} more to train "
            f"on, asked for {train or 'at least 1'}; ask for fewer training, test or labelled digits or another share"
        )
    notes = []
    if whole:
        flat = world.intensity(everything).reshape(len(labels), -1)
        columns = {"first": flat, "second": flat}
    else:
        columns = dict(zip(("top", "bottom"), world.halves(everything), strict=True))
    if labelled:
        columns["top"], right = world.tower(everything, tower_rows, test_rows, seed)
        notes.append(f"the tower names {right:.0%} of the test digits from their top halves")

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
