"""The world of styled shapes: one coloured shape in one of four drawing styles, with class names and captions.

Its functions:
    scenes     the truth: shape, colour, style, place and size of many pictures
    render     pixels
    caption    "a photo of a striped red star"
    name       "red star", the name of a class
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHAPES = ("disc", "square", "triangle", "cross", "diamond", "star", "crescent", "bar")
COLOURS = {
    "red": (215, 40, 40),
    "orange": (240, 145, 30),
    "yellow": (235, 220, 60),
    "green": (50, 165, 65),
    "cyan": (60, 200, 210),
    "blue": (45, 80, 215),
    "purple": (140, 50, 180),
    "pink": (245, 130, 190),
}
STYLES = ("plain", "outline", "striped", "bright")
ADJECTIVES = ("plain", "outlined", "striped", "bright")  # of STYLES, for captions
FINE = 2  # subpixels of a pixel, down and across
CHUNK = 256  # pictures that are rendered together


@dataclass(frozen=True)
class Scenes:
    """The truth of n pictures, an array [n] for each fact."""

    shape: NDArray[np.int64]  # of SHAPES
    colour: NDArray[np.int64]  # of COLOURS
    style: NDArray[np.int64]  # of STYLES
    place: NDArray[np.float64]  # [n, 2] row and column of the centre, in shares of the side
    radius: NDArray[np.float64]  # in shares of the side
    angle: NDArray[np.float64]  # in radians
    ground: NDArray[np.float64]  # brightness of the ground, 0..255
    phase: NDArray[np.float64]  # 0..1, shifts the stripes

    def __len__(self) -> int:
        return len(self.shape)


def scenes(
    count: int, rng: np.random.Generator, shapes: NDArray[np.int64], colours: NDArray[np.int64], styles: list[int]
) -> Scenes:
    """Draw the truth of pictures: shapes and colours as given, all else at random.

    Args:
        count: number of pictures.
        rng: source of randomness.
        shapes, colours: [count] numbers of SHAPES and COLOURS.
        styles: numbers of STYLES to draw from.
    """
    radius = rng.uniform(0.3, 0.4, count)
    place = radius[:, None] + rng.random((count, 2)) * (1 - 2 * radius[:, None])
    return Scenes(
        shapes,
        colours,
        rng.choice(styles, count),
        place,
        radius,
        rng.uniform(-0.2, 0.2, count),
        rng.uniform(25, 75, count),
        rng.random(count),
    )


def _inside(shape: int, down: NDArray[np.float64], across: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether points lie in a shape of radius 1."""
    name = SHAPES[shape]
    a, b = np.abs(down), np.abs(across)
    if name == "disc":
        return down**2 + across**2 <= 0.85
    if name == "square":
        return np.maximum(a, b) <= 0.78
    if name == "triangle":
        return (down <= 0.6) & (b * 1.73 <= down + 1.1)
    if name == "cross":
        return (np.maximum(a, b) <= 1) & (np.minimum(a, b) <= 0.3)
    if name == "diamond":
        return a * 0.8 + b * 1.25 <= 0.95
    if name == "bar":
        return (a <= 0.32) & (b <= 1)
    if name == "crescent":
        return (down**2 + across**2 <= 0.95) & (down**2 + (across - 0.55) ** 2 >= 0.55)
    turn = np.arctan2(across, -down)
    return np.hypot(down, across) <= 0.62 + 0.4 * np.cos(5 * turn)


def render(truth: Scenes, size: int, noise: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Render pictures: [n, size, size, 3].

    Args:
        truth: the truth of n pictures.
        size: height and width in pixels.
        noise: standard deviation of the noise, in intensities of 0..255.
        rng: source of the noise.
    """
    parts = [_rendered(truth, np.arange(at, min(at + CHUNK, len(truth))), size) for at in range(0, len(truth), CHUNK)]
    pixels = np.concatenate(parts) if parts else np.zeros((0, size, size, 3))
    return np.clip(np.rint(pixels + noise * rng.standard_normal(pixels.shape)), 0, 255).astype(np.uint8)


def _rendered(truth: Scenes, rows: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    fine = size * FINE
    at = (np.arange(fine) + 0.5) / fine
    place, radius, angle = truth.place[rows], truth.radius[rows, None, None], truth.angle[rows, None, None]
    y, x = at[None, :, None] - place[:, 0, None, None], at[None, None, :] - place[:, 1, None, None]
    down, across = (y * np.cos(angle) - x * np.sin(angle)) / radius, (y * np.sin(angle) + x * np.cos(angle)) / radius
    style = truth.style[rows]
    share = np.empty((len(rows), fine, fine))
    for shape in np.unique(truth.shape[rows]):
        own = truth.shape[rows] == shape
        share[own] = _inside(int(shape), down[own], across[own])
        drawn = own & (style == STYLES.index("outline"))
        share[drawn] -= _inside(int(shape), down[drawn] / 0.68, across[drawn] / 0.68) * share[drawn]
        drawn = own & (style == STYLES.index("striped"))
        waves = (y[drawn] + x[drawn]) * 9 + truth.phase[rows][drawn, None, None]
        share[drawn] *= np.where(waves % 1 < 0.55, 1.0, 0.3)
    share = share.reshape(len(rows), size, FINE, size, FINE).mean((2, 4))[..., None]
    colour = np.array(list(COLOURS.values()), float)[truth.colour[rows]]
    ground = truth.ground[rows]
    bright = style == STYLES.index("bright")
    ground = np.where(bright, 255 - ground / 2, ground)[:, None, None, None]
    colour = np.where(bright[:, None], 0.7 * colour, colour)[:, None, None]
    return ground * (1 - share) + colour * share


def name(shape: int, colour: int) -> str:
    """Return the name of the class of a coloured shape."""
    return f"{list(COLOURS)[colour]} {SHAPES[shape]}"


def caption(truth: Scenes, row: int, drop: float, rng: np.random.Generator) -> str:
    """Describe a picture by style, colour and shape.

    Args:
        truth: the truth of the pictures.
        row: number of the picture.
        drop: probability of leaving out each of the three words. A shape that is left out is a "thing".
        rng: source of the choice.
    """
    kept = rng.random(3) >= drop
    words = [
        ADJECTIVES[truth.style[row]] if kept[0] else "",
        list(COLOURS)[truth.colour[row]] if kept[1] else "",
        SHAPES[truth.shape[row]] if kept[2] else "thing",
    ]
    said = " ".join(word for word in words if word)
    return f"a photo of {'an' if said[0] in 'aeiou' else 'a'} {said}"
