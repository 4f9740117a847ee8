"""The world of digits: handwritten digits, alone or side by side, with known classes and positions.

The 1,797 digits are UCI's optical recognition set, 8 x 8 pixels in 17 shades, in scikit-learn (CC BY 4.0).

    parts      the digits for training, valid and test; every source divides them by the same rule
    scene      the truth of n pictures: the digits side by side, and their classes
    grey, intensity, enlarged, noisy, over_patterns, styled, shifted, canvases, tiles, halves, tower     styles of rendering a scene
    words, wordy                                                       captions
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.images import Indices, Pixels, split_positions
from counterpoint.data.optical import load_digits
from counterpoint.data.valid import by_content, carve

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8  # pixels of a digit
SHADES = 16  # the darkest; 0 is paper
KEPT = 64  # largest size in pixels at which the enlarged inventory is kept, 7 MB
STOP = ("a", "the", "this", "is", "of", "in", "and", "with", "on", "it", "that", "here")
# Invented words without a meaning.
DISTRACTORS = tuple(
    f"{a}{b}{c}" for a in ("ba", "de", "ki", "mo", "zu") for b in ("la", "re", "ti") for c in ("p", "g", "nu", "sho")
)
TOWER_WIDTH = 32  # of the tower's features
TOWER_STEPS = 150  # of its training, on all of its digits at once

Intensity = NDArray[np.float32]  # 0..1


@lru_cache(maxsize=1)
def inventory() -> tuple[NDArray[np.float64], Indices]:
    """Return the shades [1797, 8, 8], 0 to SHADES, and the labels [1797] of all digits."""
    found = load_digits()
    found.images.flags.writeable = False
    return found.images, found.target.astype(np.int64)


class Parts(NamedTuple):
    """The digits of each split: sorted numbers."""

    train: Indices
    valid: Indices
    test: Indices


def parts(source: str, held_out: float, valid: float) -> Parts:
    """Divide the digits, each class in proportion, the same on every machine.

    Args:
        source: name of the source, for messages.
        held_out: share of the digits in the test split, between 0 and 1.
        valid: share of the other digits in the valid split, between 0 and 1.
    """
    return Parts(*(numbers.copy() for numbers in _parts(source, held_out, valid)))


@lru_cache(maxsize=16)
def _parts(source: str, held_out: float, valid: float) -> Parts:
    shades, labels = inventory()
    rest, test = split_positions(len(labels), held_out, labels)
    train, watched = carve(source, rest, valid, labels[rest], by_content(shades[rest]))
    return Parts(train, watched, test)


# --- the truth --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """The truth of n pictures, each of k digits side by side."""

    numbers: Indices  # [n, k] of the inventory, from left to right
    labels: Indices  # [n, k] classes, 0 to 9

    def __len__(self) -> int:
        return len(self.numbers)


def scene(numbers: Indices) -> Scene:
    """Put digits side by side.

    Args:
        numbers: [n, k] numbers of the inventory, or [n] for one digit in a picture.
    """
    chosen = np.asarray(numbers, np.int64).reshape(len(numbers), -1)
    return Scene(chosen, inventory()[1][chosen])


# --- styles -----------------------------------------------------------------------------------------------------------


def _canvas(truth: Scene) -> NDArray[np.float64]:
    """Return the shades [n, 8, 8 k]."""
    return np.concatenate([inventory()[0][column] for column in truth.numbers.T], 2)


def grey(truth: Scene) -> Pixels:
    """Render unchanged: uint8 [n, 8, 8 k], white on black."""
    return np.rint(_canvas(truth) * (255 / SHADES)).astype(np.uint8)


def intensity(truth: Scene) -> Intensity:
    """Render as numbers: [n, 8, 8 k] in 0..1."""
    return (_canvas(truth) / SHADES).astype(np.float32)


def enlarged(truth: Scene, size: int) -> Pixels:
    """Render one digit in each picture, enlarged by bicubic interpolation to `size` pixels: [n, size, size]."""
    if size > KEPT or truth.numbers.shape[1] != 1:
        return resized(grey(truth), size)
    return _every(size)[truth.numbers[:, 0]]


@lru_cache(maxsize=4)
def _every(size: int) -> Pixels:
    """Return the whole inventory at `size` pixels. Whoever draws from it copies."""
    return resized(grey(scene(np.arange(len(inventory()[1])))), size)


def resized(pictures: Pixels, size: int) -> Pixels:
    """Scale grey pictures [n, height, width] by bicubic interpolation: [n, size, size]."""
    scaled = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in pictures]
    return np.stack(scaled)


def noisy(truth: Scene, deviation: float, rng: np.random.Generator) -> Intensity:
    """Render as numbers with added Gaussian noise: [n, 8, 8 k] in about 0..1, not clipped.

    Args:
        truth: the digits.
        deviation: standard deviation of the noise, in intensities of 0..1.
        rng: draws the noise.
    """
    clean = intensity(truth)
    return clean + deviation * rng.standard_normal(clean.shape, np.float32)


@dataclass(frozen=True)
class Style:
    """A drawing style: two colours, and a smooth field of light over the picture."""

    ink: NDArray[np.float64]  # [3] in 0..1
    paper: NDArray[np.float64]  # [3] in 0..1
    light: NDArray[np.float64]  # [size, size] factors, around 1


def style(size: int, rng: np.random.Generator) -> Style:
    """Draw a style for pictures of `size` pixels.

    Ink is lighter than paper, by at least 0.2 in the mean of the channels. The light is 1 plus half of the mean of three waves
    of at most one period a side.
    """
    ink, paper = rng.random((2, 3))
    while ink.mean() - paper.mean() < 0.2:
        ink, paper = rng.random((2, 3))
    at = (np.arange(size) + 0.5) / size
    light = np.ones((size, size))
    for _ in range(3):
        across, down, phase = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.random()
        light += 0.5 / 3 * np.cos(2 * np.pi * (down * at[:, None] + across * at + phase))
    return Style(ink, paper, light)


def styled(truth: Scene, styles: list[Style], which: Indices, deviation: float, rng: np.random.Generator) -> Pixels:
    """Render one digit in each picture in colours and light of a style, with noise: [n, size, size, 3].

    Args:
        truth: one digit in each picture.
        styles: styles for one size.
        which: [n] numbers of styles, one for each picture.
        deviation: standard deviation of the noise, in intensities of 0..1; the result is clipped to 0..1.
        rng: draws the noise.
    """
    size = len(styles[0].light)
    stroke = enlarged(truth, size)[..., None] / 255
    ink, paper, light = (np.stack([getattr(one, name) for one in styles])[which] for name in ("ink", "paper", "light"))
    found = (stroke * ink[:, None, None] + (1 - stroke) * paper[:, None, None]) * light[..., None]
    found += deviation * rng.standard_normal(found.shape, np.float32)
    return np.rint(found.clip(0, 1) * 255).astype(np.uint8)


def shifted(shades: NDArray[np.float64], shift: float, rng: np.random.Generator) -> Pixels:
    """Render shades [n, 8, 8], 0 to SHADES, with less contrast, more light and noise: uint8 [n, 8, 8].

    Args:
        shades: of digits, or of other pictures.
        shift: strength, 0 to 1. The contrast falls by up to 0.8 of it, the light of paper rises by up to 0.6 of it, and the noise
            has a standard deviation of 0.15 of it, in intensities of 0..1. 0: unchanged.
        rng: draws contrast and light of each picture, and the noise.
    """
    n = len(shades)
    contrast = 1 - 0.8 * shift * rng.random((n, 1, 1))
    light = 0.6 * shift * rng.random((n, 1, 1))
    found = shades / SHADES * contrast + light + 0.15 * shift * rng.standard_normal(shades.shape)
    return np.rint(found.clip(0, 1) * 255).astype(np.uint8)


def shuffled(shades: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Permute the pixels of each picture [n, 8, 8]: pictures with the shades of digits that show none."""
    return rng.permuted(shades.reshape(len(shades), -1), axis=1).reshape(shades.shape)


def over_patterns(truth: Scene, patterns: Pixels) -> Pixels:
    """Render in colour, [n, 8, 8, 3]: the digit in the first channel, a pattern in the second, zeros in the third.

    Args:
        truth: one digit in each picture.
        patterns: [n, 8, 8] uint8, one for each picture.
    """
    return np.stack([grey(truth), patterns, np.zeros_like(patterns)], 3)


def canvases(truth: Scene, cells: Indices, grid: int, deviation: float, rng: np.random.Generator) -> Pixels:
    """Render the digits of each picture in cells of a grid, with Gaussian noise: [n, 8 grid, 8 grid].

    Args:
        truth: k digits in each picture.
        cells: [n, k] different cells of each picture, row by row.
        grid: number of cells in a row and in a column.
        deviation: standard deviation of the noise, in intensities of 0..1; the result is clipped to 0..1.
        rng: draws the noise.
    """
    n, many = cells.shape
    found = np.zeros((n, grid, SIDE, grid, SIDE))
    digits = inventory()[0][truth.numbers] / SHADES
    for column in range(many):
        row, across = np.divmod(cells[:, column], grid)
        found[np.arange(n), row, :, across] = digits[:, column]
    canvas = found.reshape(n, grid * SIDE, grid * SIDE)
    canvas += deviation * rng.standard_normal(canvas.shape, np.float32)
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)


def textures(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Make textures with the shades of digits, [count, 8, 8], 0 to SHADES.

    A texture is a smooth random field. Its pixels, in order of their value, have the sorted shades of one digit.
    """
    from scipy.ndimage import gaussian_filter

    shades = np.sort(inventory()[0][rng.integers(len(inventory()[0]), size=count)].reshape(count, -1), axis=1)
    fields = gaussian_filter(rng.standard_normal((count, SIDE, SIDE)), (0, 1, 1), mode="wrap").reshape(count, -1)
    return np.take_along_axis(shades, fields.argsort(1).argsort(1), 1).reshape(count, SIDE, SIDE)


def tiles(
    truth: Scene, pool: NDArray[np.float64], cells: Indices, grid: int, deviation: float, rng: np.random.Generator
) -> Pixels:
    """Render a digit among textures, one in each cell of a grid, in colours: [n, 8 grid, 8 grid, 3].

    Args:
        truth: one digit in each picture.
        pool: textures [count, 8, 8]; every other cell has one at random.
        cells: [n] cell of each digit, row by row.
        grid: number of cells in a row and in a column.
        deviation: standard deviation of the noise, in intensities of 0..1; the result is clipped to 0..1.
        rng: draws textures, noise, and a colour for each cell from the same distribution for digits and textures.
    """
    n = len(cells)
    shades = pool[rng.integers(len(pool), size=(n, grid * grid))]
    shades[np.arange(n), cells] = inventory()[0][truth.numbers[:, 0]]
    colour = rng.uniform(0.3, 1.0, (n, grid * grid, 1, 1, 3))
    canvas = (shades[..., None] / SHADES * colour).reshape(n, grid, grid, SIDE, SIDE, 3).swapaxes(2, 3)
    canvas = canvas.reshape(n, grid * SIDE, grid * SIDE, 3)
    canvas = canvas + deviation * rng.standard_normal(canvas.shape, np.float32)
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)


def halves(truth: Scene) -> tuple[Intensity, Intensity]:
    """Render one digit as the intensities of its upper half and of its lower half: [n, 32] each."""
    flat = intensity(truth).reshape(len(truth), SIDE * SIDE)
    return flat[:, : SIDE * SIDE // 2], flat[:, SIDE * SIDE // 2 :]


def tower(truth: Scene, learned: Indices, tested: Indices, seed: int) -> tuple[Intensity, float]:
    """Render upper halves as features of a frozen network: [n, TOWER_WIDTH], its last layer before the classes.

    Args:
        truth: one digit in each picture.
        learned: [m] pictures whose upper halves train the network, 32-128-128-32, to classify the digit.
        tested: [t] pictures that the network's accuracy is measured on.
        seed: seed of its initialisation.

    Returns the features, and the network's accuracy on `tested`, 0 to 1.
    """
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):  # the run's own draws do not depend on the tower's
        torch.manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
        body = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, TOWER_WIDTH))
        names = nn.Linear(TOWER_WIDTH, len(NAMES))
    optimizer = torch.optim.AdamW([*body.parameters(), *names.parameters()], lr=3e-3)
    everything, known = torch.from_numpy(halves(truth)[0]), torch.from_numpy(truth.labels[:, 0])
    for _ in range(TOWER_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(names(body(everything[learned])), known[learned]).backward()
        optimizer.step()
    with torch.no_grad():
        features = body(everything)
        right = (names(features[tested]).argmax(1) == known[tested]).float().mean()
    return features.numpy(), float(right)


# --- captions ---------------------------------------------------------------------------------------------------------


def words(labels: Indices) -> list[str]:
    """Name digits from left to right: [n, k] -> "three seven"."""
    return [" ".join(NAMES[label] for label in row) for row in labels]


def wordy(truth: Scene, rng: np.random.Generator) -> list[str]:
    """Name one digit among three stop words and three invented words: "is the kemu four of dari wopo"."""
    found = []
    for name in words(truth.labels):
        said = [name, *rng.choice(STOP, 3, replace=False), *rng.choice(DISTRACTORS, 3, replace=False)]
        found.append(" ".join(rng.permutation(said)))
    return found
