"""`digit-parties`: a public set of two digits with the words that name them, and parties with digits of their own.

Parties with pairs, with pictures alone and with words alone. Each party knows `digits` of the ten right digits, with any left
digit. The left digit is the class of a party of one modality. The right digit is the domain of a pair.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.federations import FederatedData, Party
from counterpoint.data.images import ArrayImages, Indices
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import SHARE
from counterpoint.data.worlds import digits as world
from counterpoint.errors import CounterpointError

NOISE = 0.15


def load(
    argument: None = None,
    *,
    train: int = 200,
    test: int = 400,
    items: int = 300,
    pairs: int = 3,
    images: int = 2,
    texts: int = 2,
    digits: int = 4,
    valid: float = SHARE,
    vectors: int = 0,
    seed: int = 0,
) -> FederatedData:
    """Draw the federation (a moment).

    Args:
        argument: not used; sources share a signature.
        train: number of public pairs, at least 20.
        test: number of test pairs, and of valid pairs, at least 20.
        items: number of private items of each party, at least 20.
        pairs, images, texts: number of parties with both modalities, with pictures and with words.
        digits: number of right digits that a party knows, 1 to 10.
        valid: share of the digits outside the test split that valid pairs are made of, between 0 and 1.
        vectors: 1 gives vectors for both modalities: 128 intensities, and 20 numbers, one-hot for each word. 0 gives pictures of
            16 x 16 pixels and texts.
        seed: seed of digits, knowledge and noise.

    Raises CounterpointError for a number out of range.
    """
    if train < 20 or test < 20 or items < 20 or not 1 <= digits <= 10 or min(pairs, images, texts) < 0:
        raise CounterpointError(
            "digit-parties: train, test and items must be at least 20, digits in 1..10, and the numbers of parties not negative; "
            f"got {train}, {test}, {items}, {digits} and {pairs}, {images}, {texts}"
        )
    labels = world.inventory()[1]
    rng = np.random.default_rng([2302_08888, seed])

    def columns(numbers: Indices, count: int, known: Indices, kinds: tuple[str, ...]) -> AlignedColumns:
        of_digit = [numbers[labels[numbers] == digit] for digit in range(10)]
        if not all(map(len, of_digit)):
            raise CounterpointError(
                f"digit-parties: with valid={valid:g} a digit has no picture in the valid split; set a larger share (?valid=0.1)"
            )
        said = np.stack([rng.integers(10, size=count), known[rng.permutation(np.arange(count) % len(known))]], 1)
        chosen = np.array([[rng.choice(of_digit[digit]) for digit in pair] for pair in said])
        pixels = world.noisy(world.scene(chosen), NOISE, rng)  # [n, 8, 16]
        if vectors:
            flags = np.eye(10, dtype=np.float32)[said].reshape(len(said), 20)
            made = {"image": pixels.reshape(len(said), 128), "text": flags}
        else:
            squares = np.rint(np.clip(np.pad(pixels, ((0, 0), (4, 4), (0, 0))), 0, 1) * 255).astype(np.uint8)
            made = {"image": ArrayImages(squares), "text": world.words(said)}
        alone = len(kinds) == 1
        return AlignedColumns(
            {name: made[name] for name in kinds}, said[:, 0] if alone else None, domains=None if alone else said[:, 1]
        )

    modalities = (
        {"image": Modality("vector", dim=128), "text": Modality("vector", dim=20)}
        if vectors
        else {"image": Modality("image", size=16), "text": Modality("text")}
    )
    trained, watched, held = world.parts("digit-parties", 0.2, valid)
    both, every = ("image", "text"), np.arange(10)
    public = AlignedData(
        name="digit-parties",
        train=columns(trained, train, every, both),
        valid=columns(watched, test, every, both),
        test=columns(held, test, every, both),
        modalities=modalities,
        domains=tuple(world.NAMES),
    )
    parties = []
    for name, kinds, count in (("pairs", both, pairs), ("images", ("image",), images), ("texts", ("text",), texts)):
        for number in range(count):
            known = np.sort(rng.choice(10, digits, replace=False))
            parties.append(
                Party(
                    f"{name}-{number + 1}",
                    {kind: modalities[kind] for kind in kinds},
                    columns(trained, items, known, kinds),
                    world.NAMES if len(kinds) == 1 else (),
                )
            )
    return FederatedData(public, tuple(parties))
