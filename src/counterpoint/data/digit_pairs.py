"""Two handwritten digits side by side and the two words that name them, with some captions swapped: ALBEF's claim.

Digits are the 1,797 that ride in scikit-learn, 8 x 8 pixels with noise on them. A pair is one of 100: "three seven" is a
three on the left and a seven on the right. `swapped` is the share of training pairs whose captions are handed on among
themselves, so that nearly all of them are wrong; valid and test pairs are clean, each made of digits that no other split has.

Pictures are 16 x 16, the digits in their middle rows, with captions as texts. With `vectors=1` both sides are vectors, for
encoders of vectors: 128 pixels in about 0..1 (not clipped), and 20 numbers that are 1 for the left and the right word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import ArrayImages, split_positions
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import SHARE, by_content, carve
from counterpoint.errors import CounterpointError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_EACH = 5  # test pairs of each of the 100 captions, and as many valid pairs
NOISE = 0.15  # standard deviation, of greys in 0..1


def load(
    argument: None = None,
    *,
    train: int = 1024,
    valid: float = SHARE,
    swapped: float = 0.0,
    vectors: int = 0,
    seed: int = 0,
) -> AlignedData:
    """`train` pairs, 500 valid pairs and 500 test pairs; digits, noise and swaps are drawn with `seed`.

    `valid` is the share of the digits that are not tested on of which valid pairs are made.
    """
    from counterpoint.data.optical import load_digits

    if train < 2 or not 0 <= swapped <= 1:
        raise CounterpointError(
            f"digit-pairs needs train of at least 2 and swapped in 0..1, got train {train}, swapped {swapped}"
        )
    found = load_digits()
    greys = (found.images / 16).astype(np.float32)
    labels = found.target.astype(np.int64)
    rest, held_out = split_positions(len(labels), 0.2, labels)
    pool, watched = carve("digit-pairs", rest, valid, labels[rest], by_content(greys[rest]))
    rng = np.random.default_rng([2107_07651, seed])

    # Drawn from all, so that the test pairs do not depend on the valid ones; a digit of the pool stands in for each of these.
    chosen = _stand_ins(pool, watched, labels)[rng.choice(rest, (train, 2))]
    captions = labels[chosen]
    # A ring of the chosen ones: each takes the next one's caption.
    ring = rng.permutation(train)[: round(swapped * train)]
    captions[ring] = captions[np.roll(ring, -1)]

    wanted = np.repeat(np.stack(np.divmod(np.arange(100), 10), 1), TEST_EACH, 0)

    def paired(digits: NDArray[np.int64]) -> NDArray[np.int64]:
        of_digit = [digits[labels[digits] == digit] for digit in range(10)]
        if not all(map(len, of_digit)):
            raise CounterpointError(
                f"digit-pairs: valid={valid:g} leaves a digit without a picture in the valid split; ask for more (?valid=0.1)"
            )
        return np.array([[rng.choice(of_digit[digit]) for digit in pair] for pair in wanted])

    tested = paired(held_out)

    def split(rows: NDArray[np.int64], words: NDArray[np.int64]) -> AlignedColumns:
        pixels = np.concatenate([greys[rows[:, 0]], greys[rows[:, 1]]], 2)  # [n, 8, 16]
        pixels = pixels + NOISE * rng.standard_normal(pixels.shape, np.float32)
        if vectors:
            flags = np.eye(10, dtype=np.float32)[words].reshape(len(words), 20)
            return AlignedColumns({"image": pixels.reshape(len(rows), 128), "text": flags})
        bytes_ = np.rint(np.clip(np.pad(pixels, ((0, 0), (4, 4), (0, 0))), 0, 1) * 255).astype(np.uint8)
        return AlignedColumns({"image": ArrayImages(bytes_), "text": [f"{WORDS[a]} {WORDS[b]}" for a, b in words]})

    trained, held = split(chosen, captions), split(tested, wanted)
    return AlignedData(
        name="digit-pairs",
        train=trained,
        valid=split(paired(watched), wanted),
        test=held,
        modalities=(
            {"image": Modality("vector", dim=128), "text": Modality("vector", dim=20)}
            if vectors
            else {"image": Modality("image", size=16), "text": Modality("text")}
        ),
        notes=[f"digit-pairs: {len(ring)} of {train} training captions are swapped"] if len(ring) else [],
    )


def _stand_ins(pool: NDArray[np.int64], watched: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """[digits] the digit itself, or one of the pool of the same class in place of each of the valid split."""
    found = np.arange(len(labels))
    for digit in range(10):
        mine, others = watched[labels[watched] == digit], pool[labels[pool] == digit]
        found[mine] = others[np.arange(len(mine)) % len(others)]
    return found
