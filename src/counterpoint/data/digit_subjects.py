"""`digit-subjects`: a handwritten digit in a colour is a subject; its frames differ in turn, size, place and ground.

A caption names all four, and calls the subject "subject". The class of a frame is its scene: place and ground. No drawing of
a split is in another split.
"""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image

from counterpoint.data.digit_scenes import COLOURS, PLACES, SIZES, paint
from counterpoint.data.generation import PLACEHOLDER, GenerationData, GenerationSplit
from counterpoint.data.images import ArrayImages, Indices
from counterpoint.data.worlds import digits as world
from counterpoint.errors import CounterpointError

SIDE = 16  # pixels of a picture
TURNS = {"turned left": 30, "upright": 0, "turned right": -30}  # degrees
GROUNDS = {"black": (15, 15, 15), "navy": (25, 30, 100), "brown": (90, 50, 20), "grey": (110, 110, 110)}
FORMS = (
    f"a {{size}} {PLACEHOLDER} {{turn}} at the {{place}} on {{ground}}",
    f"on {{ground}} ground a {PLACEHOLDER} , {{turn}} and {{size}} , at the {{place}}",
    f"at the {{place}} a {{turn}} {PLACEHOLDER} , {{size}} , on {{ground}}",
)
SCENES = tuple(f"{place} on {ground}" for place in PLACES for ground in GROUNDS)
KINDS = tuple(itertools.product(TURNS, SIZES, range(len(PLACES)), GROUNDS))
HELD_OUT = VALID = 0.25  # shares of the digits that test pictures are made of, and of the others for valid


def load(argument: None = None, *, train: int = 150, test: int = 50, frames: int = 8, seed: int = 0) -> GenerationData:
    """Draw the set (a second). There are as many valid as test subjects.

    Args:
        argument: not used; sources share a signature.
        train, test: numbers of subjects, at least 2. Beyond the drawings of a split, a drawing is several subjects.
        frames: pictures of each subject, 2 to 96, all in different scenes.
        seed: seed of all pictures and captions, at least 0.

    Raises CounterpointError for an option out of range.
    """
    if min(train, test) < 2 or not 2 <= frames <= len(KINDS) or seed < 0:
        raise CounterpointError(
            f"digit-subjects: train and test must be at least 2, frames 2 to {len(KINDS)} and seed at least 0; "
            f"got {train=}, {test=}, {frames=}, {seed=}"
        )
    pools = world.parts("digit-subjects", HELD_OUT, VALID)
    splits, first = [], 0
    for number, (pool, count) in enumerate(zip(pools, (train, test, test), strict=True)):
        rng = np.random.default_rng([2409_05606, seed, number])
        splits.append(_drawn(pool, count, frames, first, rng))
        first += count
    one, watched, held = splits
    names = tuple(f"subject {n}" for n in range(first))
    return GenerationData("digit-subjects", one, watched, held, size=SIDE, classes=SCENES, subjects=names)


def _drawn(pool: Indices, count: int, frames: int, first: int, rng: np.random.Generator) -> GenerationSplit:
    """Draw the frames of subjects, numbered from `first`."""
    shades, _ = world.inventory()
    chosen = np.resize(rng.permutation(pool), count)
    inks = rng.integers(len(COLOURS), size=count)
    pixels, captions, labels = [], [], []
    for digit, ink in zip(chosen, inks, strict=True):
        grey = Image.fromarray(np.rint(shades[digit] * (255 / world.SHADES)).astype(np.uint8))
        colour = list(COLOURS.values())[ink]
        for kind in rng.choice(len(KINDS), frames, replace=False):
            turn, size, place, ground = KINDS[kind]
            side = SIZES[size]
            stroke = grey.resize((side, side), Image.Resampling.BICUBIC)
            stroke = stroke.rotate(TURNS[turn], Image.Resampling.BILINEAR)
            picture = np.tile(np.array(GROUNDS[ground], float), (SIDE, SIDE, 1))
            paint(picture, np.asarray(stroke), place, colour, rng)
            pixels.append(np.rint(picture).astype(np.uint8))
            form = FORMS[rng.integers(len(FORMS))]
            captions.append(form.format(size=size, turn=turn, place=PLACES[place], ground=ground))
            labels.append(place * len(GROUNDS) + list(GROUNDS).index(ground))
    subjects = first + np.repeat(np.arange(count), frames)
    return GenerationSplit(ArrayImages(np.stack(pixels)), captions, np.array(labels, np.int64), subjects)
