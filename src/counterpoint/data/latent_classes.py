"""`latent-classes`: items of many rare Gaussian classes with made-up names, and of classes that training lacks."""

from __future__ import annotations

import numpy as np

from counterpoint.data.episodes import EpisodeData, EpisodeSplit
from counterpoint.data.images import Indices
from counterpoint.errors import CounterpointError

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def word(number: int) -> str:
    """Return a made-up word of two or three syllables, another one for each number below 340,000.

    >>> word(0), word(71)
    ('baba', 'bebi')
    """
    syllables = [a + b for a in CONSONANTS for b in VOWELS]
    base = len(syllables)
    first, second = number % base, (number // base + number) % base
    third = number // base**2
    return syllables[first] + syllables[second] + (syllables[third - 1] if third else "")


def load(
    argument: None = None,
    *,
    classes: int = 1000,
    unseen: int = 60,
    each: int = 8,
    held: int = 20,
    width: int = 16,
    slots: int = 1,
    noise: float = 0.4,
    missing: float = 0.0,
    seed: int = 0,
) -> EpisodeData:
    """Draw the set (in a moment): the mean of a class is a standard normal vector, an item is near it.

    Args:
        argument: not used; sources share a signature.
        classes: number of known classes, at least 2.
        unseen: number of unseen classes of each of the splits valid and test, at least 2.
        each: number of training items of a known class, at least 2.
        held: number of items of each unseen class, at least 2. Valid and test have 5 times as many of known classes as there are
            unseen ones.
        width: number of features of a slot, at least 1.
        slots: number of slots, at least 1. Each is another rotation of the item, with noise of its own.
        noise: standard deviation of items around their mean, at least 0.
        missing: share of the slots that an item lacks, 0 to 1. Every item keeps one slot.
        seed: seed of everything, at least 0; another seed gives other classes and names.

    Raises CounterpointError for an option out of range.
    """
    if min(classes, unseen, each, held) < 2 or min(width, slots) < 1 or min(noise, seed) < 0 or not 0 <= missing < 1:
        raise CounterpointError(
            "latent-classes: classes, unseen, each, held >= 2; width, slots >= 1; noise, seed >= 0; 0 <= missing < 1. "
            f"Got {classes}, {unseen}, {each}, {held}, {width}, {slots}, {noise:g}, {seed} and {missing:g}"
        )
    if classes + 2 * unseen > 340_000:
        raise CounterpointError(f"latent-classes: {classes + 2 * unseen} classes are more than the 340,000 names")
    rng = np.random.default_rng([2307_07742, seed])
    total = classes + 2 * unseen
    means = rng.standard_normal((total, width))
    turns = [np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(slots)]

    def drawn(labels: Indices) -> EpisodeSplit:
        rows = [(means[labels] + noise * rng.standard_normal((len(labels), width))) @ turn for turn in turns]
        there = rng.random((len(labels), slots)) >= missing
        there[np.arange(len(labels)), rng.integers(slots, size=len(labels))] = True
        features = np.where(there[..., None], np.stack(rows, 1), 0).astype(np.float32)
        return EpisodeSplit(features, labels, there)

    def held_out(first: int) -> EpisodeSplit:
        new = np.repeat(np.arange(first, first + unseen), held)
        return drawn(np.concatenate([new, rng.integers(classes, size=5 * unseen)]))

    test = held_out(classes + unseen)  # first: the number of training items does not change it
    valid = held_out(classes)
    train = drawn(np.repeat(np.arange(classes), each))
    names = [word(n) for n in rng.permutation(max(total, 4000))[:total].tolist()]
    return EpisodeData("latent-classes", names, train, valid, test)
