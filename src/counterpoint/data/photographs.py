"""`photographs`: squares of two photographs, of a palace and of a flower, for learning to restore pictures.

The photographs come with scikit-learn, 640 x 427 pixels each: `china` by danielbuechele and `flower` by vultilion, CC BY 2.0.

Each is divided into upright strips of equal width: 5 for squares of up to 128 pixels, else fewer. The seed gives one strip to the
valid and one to the test split, and the others to training. It also shifts the squares within their strip. No two squares share
a pixel. The label of a square is its photograph. With `?sprites=1` each split has as many pictures of the source `sprites`,
too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from counterpoint.data.images import ArrayImages, ImageData, Pixels
from counterpoint.errors import CounterpointError, DataError

NAMES = ("china", "flower")
HEIGHT, WIDTH = 427, 640
LARGEST = WIDTH // 3  # pixels of a square: three strips


class Tile(NamedTuple):
    """The place of a square."""

    photograph: int
    top: int
    left: int
    split: str


@lru_cache(maxsize=1)
def inventory() -> Pixels:
    """Return the photographs, [2, 427, 640, 3] uint8. DataError where scikit-learn does not hold them in this size."""
    from sklearn.datasets import load_sample_image

    found = np.stack([load_sample_image(f"{name}.jpg") for name in NAMES])
    if found.shape != (len(NAMES), HEIGHT, WIDTH, 3):
        raise DataError(
            f"photographs: scikit-learn's sample images have shape {list(found.shape)}, which this version does not know"
        )
    found.flags.writeable = False
    return found


def tiles(size: int, seed: int) -> list[Tile]:
    """Draw the places of all squares, which do not overlap.

    Args:
        size: height and width of a square in pixels, 8 to 213.
        seed: seed of the strips' splits and of the squares' shifts.
    """
    rng = np.random.default_rng([2111_13924, seed])
    strips = min(5, WIDTH // size)
    width = WIDTH // strips
    found = []
    for photograph in range(len(NAMES)):
        splits = rng.permutation(["valid", "test", *["train"] * (strips - 2)])
        for strip, split in enumerate(splits):
            down, across = HEIGHT // size, width // size
            top, left = rng.integers(0, [HEIGHT - down * size + 1, width - across * size + 1])
            corners = [(top + y * size, strip * width + left + x * size) for y in range(down) for x in range(across)]
            found += [Tile(photograph, int(y), int(x), str(split)) for y, x in corners]
    return found


def load(argument: None = None, *, size: int = 96, sprites: int = 0, seed: int = 0) -> ImageData:
    """Return the squares of both photographs; 24 + 8 + 8 at 96 pixels.

    Args:
        argument: not used; sources share a signature.
        size: height and width of a square in pixels, 8 to 213.
        sprites: 1 adds as many pictures of game sprites to each split (package arcade). 0: photographs alone.
        seed: seed of the splits, of the squares' places, and of the sprites.

    Raises CounterpointError for an option out of range, and for sprites without the package arcade.
    """
    if not 8 <= size <= LARGEST or sprites not in (0, 1) or seed < 0:
        raise CounterpointError(
            f"photographs: size must be 8 to {LARGEST} pixels, sprites 0 or 1, seed at least 0; got {size=}, {sprites=}, {seed=}"
        )
    pixels, places = inventory(), tiles(size, seed)
    parts = {name: [tile for tile in places if tile.split == name] for name in ("train", "valid", "test")}
    more = _sprites(size, {name: len(mine) for name, mine in parts.items()}, seed) if sprites else {}
    splits: dict[str, ArrayImages] = {}
    for name, mine in parts.items():
        cut = [pixels[n, y : y + size, x : x + size] for n, y, x, _ in mine] + list(more.get(name, ()))
        labels = [tile.photograph for tile in mine] + [len(NAMES)] * (len(cut) - len(mine))
        splits[name] = ArrayImages(np.stack(cut), np.array(labels))
    classes = (*NAMES, "sprites") if sprites else NAMES
    return ImageData("photographs", splits["train"], splits["valid"], splits["test"], classes, size)


def _sprites(size: int, counts: dict[str, int], seed: int) -> dict[str, Pixels]:
    """Return pictures of the source `sprites` for each split."""
    from counterpoint.data.sprites import load as load_sprites

    numbers: dict[str, Any] = dict(counts)
    found = load_sprites(task="views", size=size, seed=seed, **numbers)
    return {name: getattr(found, name).images(np.arange(count)) for name, count in counts.items()}
