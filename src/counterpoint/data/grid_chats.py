"""`grid-chats`: questions and captions of pictures of a grid of coloured shapes, with known truth.

A picture is a grid of cells. A cell is empty or holds one of eight objects: a brick is a red square, a pond a blue disc.
Objects differ in frequency, and each has a partner that often occurs beside it. So a model can learn to guess objects
from the questions and captions alone.

    yes-no     "is there a brick ?"           "yes" or "no"
    caption    "describe the picture ."       "brick , pond ."
    careful    "describe the picture with care ."   the same, always true
    inventive  "imagine more in the picture ."      with one object that the picture does not show

The last two are captions of training pictures, with `?styles=1`. With `?pairs=N`, N further training pictures
have a true caption and a worse one. The worse one also names an object that the picture does not show. So have the captions of
valid and test then.

As in POPE (arXiv 2305.10355), the absent objects of questions are random ones, popular ones, or adversarial ones: partners of
objects that the picture shows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.chats import Chat, ChatData, ChatSplit
from counterpoint.data.images import ArrayImages
from counterpoint.data.valid import checked_count
from counterpoint.data.worlds.shapes import COLOURS, SHAPES, within
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.errors import CounterpointError

LOOKS = {  # of an object: colour and shape
    "brick": ("red", "square"),
    "roof": ("red", "triangle"),
    "pond": ("blue", "disc"),
    "tile": ("blue", "square"),
    "leaf": ("green", "triangle"),
    "lime": ("green", "disc"),
    "sun": ("yellow", "disc"),
    "tent": ("yellow", "triangle"),
}
OBJECTS = tuple(LOOKS)
ASKS = "describe the picture ."
CAREFUL = "describe the picture with care ."
INVENTIVE = "imagine more in the picture ."
GROUPS = ("random", "popular", "adversarial")
POPULAR = 3  # of the most frequent objects


def load(
    argument: None = None,
    *,
    train: int = 1500,
    valid: int = 150,
    test: int = 300,
    unlabelled: int = 0,
    grid: int = 3,
    cell: int = 8,
    most: int = 4,
    questions: int = 2,
    captions: int = 1,
    yes: float = 0.65,
    flips: float = 0.1,
    invented: float = 0.0,
    noise: float = 0.0,
    styles: int = 0,
    pairs: int = 0,
    seed: int = 0,
) -> ChatData:
    """Draw the set (about a second).

    Args:
        argument: not used; sources share a signature.
        train, test: numbers of pictures, at least 2.
        valid: number of valid pictures; -1 for as many as test pictures.
        unlabelled: number of further pictures without chats.
        grid: cells of a picture, down and across; 2 to 8.
        cell: height and width of a cell in pixels, 4 to 64.
        most: maximum number of objects in a picture, at least 1.
        questions, captions: chats of each kind for a picture, at least 0.
        yes: share of training questions whose answer is yes, 0..1. In valid and test it is a half.
        flips: share of wrong answers to training questions, 0..1.
        invented: share of training captions with one object that the picture does not show, 0..1.
        noise: standard deviation of noise on pictures of valid and test, in shares of the range of a pixel; at least 0.
        styles: 1: each training picture also has a careful and an inventive caption.
        pairs: number of further training pictures with a true caption and a worse one, at least 0.
        seed: seed of the pictures and chats, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    shares = {"yes": yes, "flips": flips, "invented": invented}
    if any(not 0 <= share <= 1 for share in shares.values()):
        raise CounterpointError(f"grid-chats: yes, flips and invented must lie in 0..1, got {shares}")
    if (
        min(train, test) < 2
        or not 2 <= grid <= 8
        or not 4 <= cell <= 64
        or not 1 <= most <= min(grid * grid, len(OBJECTS) - 1)
        or min(questions, captions, unlabelled, pairs, seed) < 0
        or questions + captions < 1
        or noise < 0
    ):
        raise CounterpointError(
            "grid-chats: train and test must be at least 2, grid 2 to 8. A cell has 4 to 64 pixels, and most is 1 to "
            f"{len(OBJECTS) - 1}, at most the number of cells. At least one of questions and "
            "captions is above 0, and the other numbers are at least 0"
        )
    counts = (train, checked_count("grid-chats", valid, test), test)
    splits = []
    for number, count in enumerate(counts):
        rng = np.random.default_rng([2405_17821, seed, number])
        taught = number == 0
        scenes = [scene(rng, grid, most) for _ in range(count)]
        pixels = np.stack([render(truth, cell, rng, 0.0 if taught else noise) for truth in scenes])
        chats = []
        for at, truth in enumerate(scenes):
            for _ in range(questions):
                chats.append(_asked(rng, at, truth, yes if taught else 0.5, flips if taught else 0.0))
            for _ in range(captions):
                chats.append(_captioned(rng, at, truth, invented if taught else 0.0))
            if taught and styles:
                chats += [_captioned(rng, at, truth, *style) for style in ((0.0, CAREFUL), (1.0, INVENTIVE))]
        if pairs and taught:
            rng = np.random.default_rng([2405_17821, seed, 4])
            more = [scene(rng, grid, most) for _ in range(pairs)]
            pixels = np.concatenate([pixels, np.stack([render(truth, cell, rng) for truth in more])])
            chats += [_worse(rng, truth, _captioned(rng, count + n, truth, 0.0)) for n, truth in enumerate(more)]
        elif pairs:
            rng = np.random.default_rng([2405_17821, seed, 4, number])
            chats = [_worse(rng, scenes[c.pictures[0]], c) if c.kind == "caption" else c for c in chats]
        splits.append(ChatSplit(chats, ArrayImages(pixels)))
    further = None
    if unlabelled:
        rng = np.random.default_rng([2405_17821, seed, 3])
        further = ArrayImages(np.stack([render(scene(rng, grid, most), cell, rng) for _ in range(unlabelled)]))
    named = {name: (name,) for name in OBJECTS}
    return ChatData("grid-chats", splits[0], splits[1], splits[2], grid * cell, named, further)


def partner(object: int) -> int:
    """Return the object that often occurs beside this one."""
    return object ^ 1


def scene(rng: np.random.Generator, grid: int, most: int) -> NDArray[np.int64]:
    """Draw the truth of a picture: [grid, grid] numbers of OBJECTS, -1 for an empty cell. No object occurs twice."""
    frequency = 1 / (2.0 + np.arange(len(OBJECTS)))
    chosen: list[int] = []
    while len(chosen) < rng.integers(1, most, endpoint=True):
        follows = len(chosen) > 0 and rng.random() < 0.6
        new = partner(chosen[-1]) if follows else int(rng.choice(len(OBJECTS), p=frequency / frequency.sum()))
        if new in chosen:
            if follows:
                break
            continue
        chosen.append(new)
    cells = np.full(grid * grid, -1)
    cells[rng.permutation(grid * grid)[: len(chosen)]] = chosen
    return cells.reshape(grid, grid)


def render(truth: NDArray[np.int64], cell: int, rng: np.random.Generator, noise: float = 0.0) -> NDArray[np.uint8]:
    """Render a picture: [size, size, 3] pixels, with the objects on a random dark ground."""
    at = (np.arange(cell) + 0.5) / cell - 0.5
    pixels = np.broadcast_to(rng.uniform(20, 70, 3), (len(truth), cell, len(truth), cell, 3)).copy()
    for row, column in np.argwhere(truth >= 0):
        colour, shape = LOOKS[OBJECTS[int(truth[row, column])]]
        shift = rng.uniform(-0.06, 0.06, 2)
        own = within(SHAPES.index(shape), (at + shift[0])[:, None], (at + shift[1])[None, :], rng.uniform(0.34, 0.42))
        pixels[row, :, column][own] = COLOURS[colour]
    if noise:
        pixels += rng.normal(0, 255 * noise, pixels.shape)
    size = len(truth) * cell
    return np.rint(pixels.clip(0, 255)).astype(np.uint8).reshape(size, size, 3)


def _present(truth: NDArray[np.int64]) -> list[int]:
    """Return the objects of a picture in reading order."""
    return [int(object) for object in truth.ravel() if object >= 0]


def _asked(rng: np.random.Generator, picture: int, truth: NDArray[np.int64], yes: float, flips: float) -> Chat:
    """Ask for an object that is present or not."""
    here, group = _present(truth), str(rng.choice(GROUPS))
    right = rng.random() < yes
    absent = [n for n in range(len(OBJECTS)) if n not in here]
    if group == "popular":
        absent = [n for n in range(POPULAR) if n not in here] or absent
    elif group == "adversarial":
        absent = [partner(n) for n in here if partner(n) not in here] or absent
    asked = int(rng.choice(here if right else absent))
    said = right != (rng.random() < flips)
    turns = (Message("user", f"{IMAGE} is there a {OBJECTS[asked]} ?"), Message("assistant", "yes" if said else "no"))
    return Chat(turns, (picture,), "yes-no", group, objects=tuple(OBJECTS[n] for n in here))


def _captioned(
    rng: np.random.Generator, picture: int, truth: NDArray[np.int64], invented: float, asks: str = ASKS
) -> Chat:
    """Describe the picture in reading order; where an object is invented, it is mostly the partner of a present one."""
    here = _present(truth)
    named = list(here)
    if rng.random() < invented:
        named = _with_invented(rng, here)
    turns = (Message("user", f"{IMAGE} {asks}"), Message("assistant", _caption(named)))
    return Chat(turns, (picture,), "caption", objects=tuple(OBJECTS[n] for n in here))


def _worse(rng: np.random.Generator, truth: NDArray[np.int64], chat: Chat) -> Chat:
    """Give a caption a worse one, with an invented object."""
    return replace(chat, rejected=_caption(_with_invented(rng, _present(truth))))


def _with_invented(rng: np.random.Generator, here: list[int]) -> list[int]:
    """Insert an object that the picture does not show, if possible the partner of a present one."""
    absent = [partner(n) for n in here if partner(n) not in here]
    absent = absent or [n for n in range(len(OBJECTS)) if n not in here]
    named = list(here)
    named.insert(int(rng.integers(len(named) + 1)), int(rng.choice(absent)))
    return named


def _caption(named: list[int]) -> str:
    return " , ".join(OBJECTS[n] for n in named) + " ."
