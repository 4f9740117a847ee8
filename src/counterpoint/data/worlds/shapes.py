"""The world of shapes: scenes of discs, squares and triangles in several textures, with exact masks, boxes and captions.

Its functions:
    scene      the truth: the objects from back to front
    render     pixels, and the object that owns each pixel
    mask       class numbers of pixels, by texture or by shape
    portrait   one object in the middle of a square, turned and scaled
    boxes      the visible extent of each object
    caption    "a striped red disc and a dotted blue square"
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.dense import Boxes

SHAPES = ("disc", "square", "triangle")
TEXTURES = ("stripes", "checks", "dots", "noise")
ADJECTIVES = ("striped", "checked", "dotted", "speckled")  # of TEXTURES, for captions
COLOURS = {
    "red": (200, 45, 40),
    "orange": (230, 140, 30),
    "yellow": (225, 210, 60),
    "green": (60, 160, 70),
    "blue": (50, 90, 200),
    "purple": (135, 60, 170),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
KINDS = {"texture": TEXTURES, "shape": SHAPES}
LEAST = 6  # visible pixels of an object that has a box


@dataclass(frozen=True)
class Object:
    """One object of a scene."""

    shape: int  # of SHAPES
    texture: int  # of TEXTURES
    colour: NDArray[np.float64]  # [3] RGB in 0..255
    other: NDArray[np.float64]  # [3] second colour of the texture
    place: tuple[float, float]  # row and column of the centre, in shares of the picture's side
    radius: float  # in shares of the picture's side
    phase: float  # 0..1, shifts the texture


@dataclass(frozen=True)
class Scene:
    """The truth of a picture: its objects from back to front, and the flat colour behind them."""

    objects: tuple[Object, ...]
    background: NDArray[np.float64]  # [3] RGB in 0..255


def scene(rng: np.random.Generator, least: int = 2, most: int = 4, named: bool = False) -> Scene:
    """Draw a scene.

    Args:
        rng: source of all random numbers.
        least, most: range of the number of objects.
        named: take the objects' colours from COLOURS, for captions. By default any colour.
    """
    palette = np.array(list(COLOURS.values()), float)

    def colour() -> NDArray[np.float64]:
        return palette[rng.integers(len(palette))] if named else rng.uniform(20, 235, 3)

    objects = []
    for _ in range(rng.integers(least, most, endpoint=True)):
        radius = rng.uniform(0.14, 0.26)
        main = colour()
        other = main + 90 * np.where(main > 127, -1, 1) * rng.uniform(0.7, 1.2, 3)
        place = tuple(rng.uniform(radius * 0.7, 1 - radius * 0.7, 2).tolist())
        objects.append(
            Object(
                int(rng.integers(len(SHAPES))),
                int(rng.integers(len(TEXTURES))),
                main,
                np.clip(other, 0, 255),
                (place[0], place[1]),
                float(radius),
                float(rng.random()),
            )
        )
    return Scene(tuple(objects), rng.uniform(40, 215, 3))


def _centres(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    at = (np.arange(size) + 0.5) / size
    return at[:, None], at[None, :]


def within(shape: int, down: NDArray[np.float64], across: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    """Return whether points lie inside a shape, by their distances down and across from its centre."""
    if SHAPES[shape] == "disc":
        return down**2 + across**2 <= radius**2
    if SHAPES[shape] == "square":
        half = 0.89 * radius  # a square of the disc's area
        return np.maximum(np.abs(down), np.abs(across)) <= half
    reach = 1.35 * radius  # an upright triangle of the disc's area, by its half-planes
    return (down <= 0.5 * reach) & (np.abs(across) * np.sqrt(3) <= down + reach)


def weave(
    texture: int, down: NDArray[np.float64], across: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return shares of a texture's second colour at points, 0..1. Patterns repeat every 4 units."""
    name = TEXTURES[texture]
    shape = np.broadcast_shapes(down.shape, across.shape)
    if name == "stripes":
        return np.broadcast_to(down % 4 < 2, shape).astype(float)
    if name == "checks":
        return ((down % 4 < 2) ^ (across % 4 < 2)).astype(float)
    if name == "dots":
        return ((down % 4 - 1.5) ** 2 + (across % 4 - 1.5) ** 2 < 1.6).astype(float)
    return rng.random(shape)


def portrait(
    shown: Object, size: int, rng: np.random.Generator, angle: float, zoom: float, shift: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Render one object in the middle of a square: pixels [size, size, 3], and whether it covers a pixel.

    Args:
        shown: the object; its place and radius do not count.
        size: height and width in pixels.
        rng: source of the speckles; the same state gives the same speckles.
        angle: rotation in degrees.
        zoom: factor of its size; at 1 it fills most of the square.
        shift: displacement down and across, in shares of the side.
    """
    down, across = _centres(size)
    turn = np.deg2rad(angle)
    down, across = down - 0.5 - shift[0], across - 0.5 - shift[1]
    down, across = down * np.cos(turn) - across * np.sin(turn), down * np.sin(turn) + across * np.cos(turn)
    unit = 24 / zoom  # so that a texture grows with its object
    share = weave(shown.texture, down * unit + 4 * shown.phase + 64, across * unit + 4 * shown.phase + 64, rng)[
        ..., None
    ]
    return shown.colour * (1 - share) + shown.other * share, within(shown.shape, down, across, 0.36 * zoom)


def render(truth: Scene, size: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render a scene: pixels [size, size, 3], and the owner [size, size] of each pixel, 0 for the background.

    Args:
        truth: the scene. Object number n, from 1, covers those before it.
        size: height and width in pixels.
        rng: source of the speckles.
    """
    pixels = np.broadcast_to(truth.background, (size, size, 3)).copy()
    owner = np.zeros((size, size), np.int64)
    for number, object in enumerate(truth.objects, start=1):
        down, across = _centres(size)
        own = within(object.shape, down - object.place[0], across - object.place[1], object.radius)
        at = np.arange(size) * 32 / size + 4 * object.phase
        share = weave(object.texture, at[:, None], at[None, :], rng)[..., None]
        pixels[own] = (object.colour * (1 - share) + object.other * share)[own]
        owner[own] = number
    return np.rint(pixels).astype(np.uint8), owner


def mask(truth: Scene, owner: NDArray[np.int64], by: str = "texture") -> NDArray[np.uint8]:
    """Return class numbers [size, size]: 0 for the background, else 1 + the object's texture or shape."""
    kinds = [0, *(1 + getattr(object, by) for object in truth.objects)]
    return np.array(kinds, np.uint8)[owner]


def boxes(truth: Scene, owner: NDArray[np.int64], by: str = "texture") -> Boxes:
    """Return the visible extent of each object of which at least LEAST pixels are visible."""
    corners, labels, identities = [], [], []
    for number, object in enumerate(truth.objects, start=1):
        rows, columns = np.nonzero(owner == number)
        if len(rows) >= LEAST:
            corners.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            labels.append(1 + getattr(object, by))
            identities.append(number)
    return Boxes(
        np.array(corners, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(identities, np.int64)
    )


def caption(truth: Scene) -> str:
    """Describe the objects of a scene, from back to front. Colours are the nearest of COLOURS."""
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), float)
    said = [
        f"a {ADJECTIVES[object.texture]} {names[int(((palette - object.colour) ** 2).sum(1).argmin())]} {SHAPES[object.shape]}"
        for object in truth.objects
    ]
    return ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1] if said else "an empty picture"
