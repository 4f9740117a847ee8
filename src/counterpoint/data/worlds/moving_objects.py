"""A world of named objects that move: each has a size, a speed and a bounciness, which a clip of it shows and a text rarely says.

An object's name is an invented word. A clip has a row of eight numbers for each of its frames, with noise:

    0, 1   place, across and in height     4   apparent size, from size and distance
    2, 3   their changes since the frame   5   brightness, the same in all frames
           before                          6   distance, the same in all frames
                                           7   noise alone

All are shifted to a mean near 0.

Distance, brightness, starting place and direction differ from clip to clip. So one frame does not give the attributes away.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS: dict[str, tuple[str, ...]] = {
    "size": ("tiny", "small", "large", "huge"),
    "speed": ("slow", "steady", "fast"),
    "bounciness": ("dead", "springy", "bouncy"),
}
SIZES, SPEEDS, KEPT = (0.4, 0.7, 1.0, 1.3), (0.2, 0.6, 1.2), (0.1, 0.5, 0.85)
WIDTH = 8  # numbers of a frame
GRAVITY, STEPS = 0.35, 4  # of a frame and simulation steps in it

ONSETS, VOWELS, ENDS = "bdfgklmnprstvz", "aeiou", "bdgklmnprtx"
PLACES = (
    "yard",
    "road",
    "hall",
    "field",
    "bridge",
    "market",
    "garden",
    "stairs",
    "river",
    "corner",
    "window",
    "tunnel",
)
PEOPLE = ("child", "woman", "man", "dog", "neighbour", "teacher", "friend", "stranger")
VERBS = ("passed", "crossed", "left", "reached", "entered", "faced", "followed", "circled")
TIMES = ("today", "yesterday", "again", "later", "now", "twice")


def names(rng: np.random.Generator, count: int) -> list[str]:
    """Draw different invented words of two syllables, at most 9,000."""
    found: dict[str, None] = {}
    while len(found) < count:
        parts = [rng.choice(list(letters)) for letters in (ONSETS, VOWELS, ONSETS, VOWELS, ENDS)]
        found["".join(parts)] = None
    return list(found)


def clip(rng: np.random.Generator, levels: tuple[int, int, int], frames: int, noise: float) -> NDArray[np.float32]:
    """Draw one clip [frames, 8] of an object with these levels of size, speed and bounciness."""
    size, speed, kept = SIZES[levels[0]], SPEEDS[levels[1]], KEPT[levels[2]]
    direction, distance = rng.choice([-1.0, 1.0]), rng.uniform(0.8, 1.25)
    x, y, up = rng.uniform(-1, 1), rng.uniform(0.8, 1.6), 0.0
    rows = np.zeros((frames, WIDTH))
    rows[:, 5], rows[:, 6] = 0.5 * rng.standard_normal(), distance - 1
    before = x, y
    for t in range(frames):
        rows[t, :5] = x / 2, y - 0.5, x - before[0], y - before[1], 2 * (size / distance - 0.85)
        before = x, y
        for _ in range(STEPS):
            x += direction * speed / STEPS
            up -= GRAVITY / STEPS
            y += up / STEPS
            if y < 0:
                y, up = -y * kept, -up * kept
    rows[:, [0, 2]] /= distance
    return (rows + noise * rng.standard_normal(rows.shape)).astype(np.float32)


def sentence(rng: np.random.Generator, name: str, adjective: str = "") -> str:
    """Draw a sentence on an object, which says none of its attributes but the given adjective."""
    person, place, verb, time = (str(rng.choice(words)) for words in (PEOPLE, PLACES, VERBS, TIMES))
    thing = f"{adjective} {name}".strip()
    forms = (
        f"the {thing} {verb} the {place} {time}",
        f"{time} the {person} saw the {thing} near the {place}",
        f"a {thing} {verb} the {person} in the {place}",
        f"the {person} in the {place} has a {thing}",
    )
    return forms[int(rng.integers(len(forms)))]
