"""`digit-scenes`: a handwritten digit in a colour, a size and a place, and a caption of all four; the digit is the class.

A digit has a name in each of several languages, so its class is not one word. Captions have six forms.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.generation import GenerationData, GenerationSplit, unknown_notes
from counterpoint.data.images import ArrayImages, Indices
from counterpoint.data.valid import SHARE, checked_share
from counterpoint.data.worlds import digits as world
from counterpoint.errors import CounterpointError

SIDE = 16  # pixels of a picture
NAMES = (
    world.NAMES,
    ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
    ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"),
    ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"),
    ("nolla", "yksi", "kaksi", "kolme", "neljä", "viisi", "kuusi", "seitsemän", "kahdeksan", "yhdeksän"),
)
COLOURS = {
    "red": (235, 60, 50),
    "yellow": (235, 215, 60),
    "green": (60, 190, 80),
    "cyan": (60, 205, 220),
    "blue": (80, 110, 245),
    "pink": (245, 130, 200),
}
SIZES = {"small": 8, "large": 12}  # pixels of the digit
PLACES = ("top left", "top right", "bottom left", "bottom right")
FORMS = (
    "a {size} {colour} {name} at the {place}",
    "{name} in {colour} , {size} , {place}",
    "at the {place} a {name} , {size} and {colour}",
    "the {colour} digit {name} is {size} and stands {place}",
    "{size} {name} painted {colour} in the {place} corner",
    "this picture shows a {colour} {name} of {size} size {place}",
)
PAPER, DEVIATION = 24.0, 6.0  # mean intensity of the paper, and of the noise, in 0..255


def load(
    argument: None = None,
    *,
    train: int = 1200,
    test: int = 400,
    valid: float = SHARE,
    held_out: float = 0.25,
    names: int = 5,
    unknown: float = 0.0,
    seed: int = 0,
) -> GenerationData:
    """Draw the set (a second). No digit of a split is in another split. There are as many valid as test pictures.

    Args:
        argument: not used; sources share a signature.
        train, test: numbers of pictures, at least 2.
        valid: share of the digits outside the test split that valid pictures are made of, between 0 and 1.
        held_out: share of the digits that test pictures are made of, between 0 and 1, the same for every class.
        names: number of names of each digit, 1 to 5.
        unknown: share of training pictures without a class, 0 to 1.
        seed: seed of all pictures and captions, at least 0.

    Raises CounterpointError for an option out of range.
    """
    checked_share("digit-scenes", valid)
    if (
        min(train, test) < 2
        or not 0 < held_out < 1
        or not 1 <= names <= len(NAMES)
        or not 0 <= unknown <= 1
        or seed < 0
    ):
        raise CounterpointError(
            f"digit-scenes: train and test must be at least 2, held_out between 0 and 1. It has 1 to {len(NAMES)} names. "
            f"unknown lies in 0..1, and seed is at least 0; got {train=}, {test=}, {held_out=}, {names=}, {unknown=}, {seed=}"
        )
    pools = world.parts("digit-scenes", held_out, valid)
    splits = []
    for number, (pool, count) in enumerate(zip(pools, (train, test, test), strict=True)):
        rng = np.random.default_rng([2412_03957, seed, number])
        splits.append(_drawn(pool, count, names, 0.0 if number else unknown, rng))
    first, watched, held = splits
    return GenerationData(
        "digit-scenes",
        first,
        watched,
        held,
        size=SIDE,
        classes=world.NAMES,
        notes=unknown_notes("digit-scenes", *splits),
    )


def _drawn(pool: Indices, count: int, names: int, unknown: float, rng: np.random.Generator) -> GenerationSplit:
    """Draw pictures of digits of a pool, with captions and labels."""
    shades, labels = world.inventory()
    chosen = rng.permutation(np.resize(rng.permutation(pool), count))
    pixels = PAPER + DEVIATION * rng.standard_normal((count, SIDE, SIDE, 3))
    captions = []
    for row, digit in enumerate(chosen):
        colour, size = (list(kind)[rng.integers(len(kind))] for kind in (COLOURS, SIZES))
        place, side = int(rng.integers(len(PLACES))), SIZES[size]
        small = np.rint(shades[digit] * (255 / world.SHADES)).astype(np.uint8)
        stroke = np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))
        paint(pixels[row], stroke, place, COLOURS[colour], rng)
        name = NAMES[rng.integers(names)][labels[digit]]
        form = FORMS[rng.integers(len(FORMS))]
        captions.append(form.format(size=size, colour=colour, name=name, place=PLACES[place]))
    known = np.where(rng.random(count) < unknown, -1, labels[chosen])
    return GenerationSplit(ArrayImages(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)), captions, known)


def paint(
    picture: NDArray[np.float64],
    stroke: NDArray[np.uint8],
    place: int,
    colour: tuple[int, int, int],
    rng: np.random.Generator,
) -> None:
    """Paint a digit into a picture, in or near the corner of this number."""
    side = len(stroke)
    room = len(picture) - side
    down, across = (int(rng.integers(room // 4 + 1)) for _ in range(2))
    down, across = (room - down if place // 2 else down), (room - across if place % 2 else across)
    part = picture[down : down + side, across : across + side]
    part += stroke[..., None] / 255 * (np.array(colour) - part)
