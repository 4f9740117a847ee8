"""A world of booking dialogs with known frames: each turn of the user has one path (domain, intent, slot, value) of a small tree.

A user's turn names the four nodes of its path by words that mean them, among filler words. It leaves out some nodes: their cues
are drawn with a probability each, the value is always there. The other speaker asks for a slot, or repeats the value.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.dialogs import SYSTEM, USER, Frame, Turn

Path = tuple[int, int, int, int]

# Words that mean a node, three for each.
DOMAINS: dict[str, tuple[str, ...]] = {
    "restaurant": ("restaurant", "diner", "bistro"),
    "hotel": ("hotel", "inn", "lodge"),
    "train": ("train", "railway", "express"),
    "taxi": ("taxi", "cab", "driver"),
    "museum": ("museum", "gallery", "exhibition"),
}
INTENTS: dict[str, tuple[str, ...]] = {
    "find": ("find", "search", "suggest"),
    "book": ("book", "reserve", "order"),
    "change": ("change", "move", "update"),
    "cancel": ("cancel", "drop", "withdraw"),
}
SLOTS: dict[str, tuple[str, ...]] = {
    "area": ("area", "quarter", "district"),
    "day": ("day", "date", "weekday"),
    "time": ("time", "hour", "clock"),
    "people": ("people", "guests", "persons"),
    "price": ("price", "budget", "cost"),
    "rating": ("rating", "stars", "quality"),
}
VALUES = (
    "amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "haven", "indigo", "jade",
    "karma", "lotus", "maple", "nova", "onyx", "pearl", "quartz", "raven", "sable", "tulip",
)  # fmt: skip
SIZES = (len(DOMAINS), len(INTENTS), len(SLOTS), len(VALUES))
ONSETS, VOWELS = "bdfgklmnprstvz", "aeiou"
QUESTIONS = ("which {} please", "tell me the {}", "what {} do you want")
ANSWERS = ("noted {}", "it is {} then", "{} is possible")


def fillers(rng: np.random.Generator, count: int) -> list[str]:
    """Draw different filler words of two syllables, at most 4,000."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(list(letters)) for letters in (ONSETS, VOWELS, ONSETS, VOWELS))] = None
    return list(found)


def paths(rng: np.random.Generator, count: int) -> list[Path]:
    """Draw different paths of the tree, at most 2,400."""
    chosen = rng.permutation(int(np.prod(SIZES)))[:count]
    domains, intents, slots, values = (part.tolist() for part in np.unravel_index(chosen, SIZES))
    return list(zip(domains, intents, slots, values, strict=True))


def frame(path: Path, scheme: int = 0) -> Frame:
    """Return the frame of a path by one of three annotation schemes: the whole path, domain and intent, or slot and value."""
    d, a, s, v = list(DOMAINS)[path[0]], list(INTENTS)[path[1]], list(SLOTS)[path[2]], VALUES[path[3]]
    if scheme == 1:
        return {d: {a: {}}}
    return {"DEFAULT_DOMAIN": {"DEFAULT_INTENT": {s: [v]}}} if scheme == 2 else {d: {a: {s: [v]}}}


def utterance(
    rng: np.random.Generator, path: Path, cues: tuple[float, float, float], words: list[str], noise: int
) -> str:
    """Draw a turn of the user: the words of its nodes in order, with filler words between them.

    Args:
        rng: generator of the draws.
        path: numbers of domain, intent, slot and value.
        cues: probabilities that domain, intent and slot are named.
        words: the filler words.
        noise: number of filler words.
    """
    named = []
    for level, at in ((1, path[1]), (0, path[0]), (2, path[2])):  # intent, domain, slot
        meant = list((DOMAINS, INTENTS, SLOTS)[level].values())[at]
        if rng.random() < cues[level]:
            named.append(str(rng.choice(meant)))
    named.append(VALUES[path[3]])
    places = np.sort(rng.choice(len(named) + noise, len(named), replace=False)).tolist()
    found = [words[n] for n in rng.integers(len(words), size=len(named) + noise)]
    for place, word in zip(places, named, strict=True):
        found[place] = word
    return " ".join(found)


def answer(rng: np.random.Generator, path: Path) -> str:
    """Draw a turn of the other speaker, which asks for a slot or repeats the value."""
    if rng.random() < 0.5:
        return str(rng.choice(QUESTIONS)).format(rng.choice(list(SLOTS.values())[rng.integers(len(SLOTS))]))
    return str(rng.choice(ANSWERS)).format(VALUES[path[3]])


def dialog(
    rng: np.random.Generator,
    chosen: list[Path],
    cues: tuple[float, float, float],
    words: list[str],
    noise: int,
    scheme: int | None,
) -> list[Turn]:
    """Draw a dialog with a turn of the user for each path, and an answer between two of them.

    Args:
        chosen: the paths, in order.
        scheme: annotation scheme of the frames; None: no annotation.
    """
    turns = []
    for n, path in enumerate(chosen):
        if n:
            turns.append(Turn(SYSTEM, answer(rng, chosen[n - 1])))
        turns.append(
            Turn(USER, utterance(rng, path, cues, words, noise), None if scheme is None else frame(path, scheme))
        )
    return turns
