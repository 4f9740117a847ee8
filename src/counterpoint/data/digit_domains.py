"""`digit-domains`: one handwritten digit in five domains. In each a digit has its own name, such as "mirrored three".

The domains are plain, inverted, transposed, mirrored and rolled by 3 pixels; they are learned in this order. A digit of a split is
in no other split. Some digits are kept for the network that a learner begins with: `?origin=1` has these alone, and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import ArrayImages, ImageData, Indices
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import SHARE
from counterpoint.data.worlds import digits as world
from counterpoint.errors import CounterpointError

DOMAINS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "plain": lambda x: x,
    "inverted": lambda x: 1 - x,
    "transposed": lambda x: x.swapaxes(1, 2),
    "mirrored": lambda x: x[:, :, ::-1],
    "rolled": lambda x: np.roll(x, 3, 2),
}
NOISE = 0.15  # standard deviation, of intensities in 0..1
ORIGIN = 0.1  # share of the digits outside test and valid that are kept for the beginning


def load(
    argument: None = None,
    *,
    task: str = "views",
    train: int = 640,
    test: int = 400,
    domains: int = 5,
    shared: int = 0,
    origin: int = 0,
    valid: float = SHARE,
    seed: int = 0,
) -> ImageData | AlignedData:
    """Draw the set (a moment).

    Args:
        argument: not used; sources share a signature.
        task: "views" for pictures with classes and domains; "aligned" for pictures and their names.
        train: number of training pictures of a domain, at least 20; with origin=1 at most 80.
        test: number of test pictures of a domain, and of valid pictures, at least 20.
        domains: number of domains, 1 to 5.
        shared: 1 names a digit alike in all domains ("three"): 10 classes. 0 gives 10 classes to each domain.
        origin: 1 gives the pictures to begin with. They are in no split of origin=0.
        valid: share of the digits outside the test split that valid pictures are made of, between 0 and 1.
        seed: seed of digits and noise.

    Raises CounterpointError for a number out of range.
    """
    if train < 20 or test < 20 or not 1 <= domains <= len(DOMAINS) or seed < 0:
        raise CounterpointError(
            f"digit-domains: needs train and test of at least 20, domains in 1..{len(DOMAINS)}, seed of at least 0; "
            f"got {train=}, {test=}, {domains=}, {seed=}"
        )
    labels, names = world.inventory()[1], list(DOMAINS)[:domains]
    trained, watched, held = world.parts("digit-domains", 0.25, valid)
    kept = np.random.default_rng(2411_06764).permutation(trained)
    count = round(ORIGIN * len(kept))
    trained = kept[:count] if origin else kept[count:]
    rng = np.random.default_rng([2411_06764, seed, origin])

    def drawn(numbers: Indices, each: int) -> tuple[NDArray[np.uint8], Indices, Indices]:
        """Draw the pictures of a split, every digit equally often in a domain, with the digits and the domains."""
        of_digit = [numbers[labels[numbers] == digit] for digit in range(10)]
        if not all(map(len, of_digit)):
            raise CounterpointError(
                f"digit-domains: with valid={valid:g} a digit has no picture in a split; set another share (?valid=0.1)"
            )
        domain, digit = np.repeat(np.arange(domains), each), np.tile(np.arange(each) % 10, domains)
        chosen = np.array([rng.choice(of_digit[d]) for d in digit])
        shades = world.intensity(world.scene(chosen))
        for number, change in enumerate(DOMAINS.values()):
            shades[domain == number] = change(shades[domain == number])
        shades = shades + NOISE * rng.standard_normal(shades.shape, np.float32)
        return np.rint(np.clip(shades, 0, 1) * 255).astype(np.uint8), digit, domain

    made = {
        "train": drawn(trained, 80 if origin and train > 80 else train),
        "valid": drawn(watched, test),
        "test": drawn(held, test),
    }
    classes = world.NAMES if shared else tuple(f"{name} {digit}" for name in names for digit in world.NAMES)
    classed = {split: digit + (0 if shared else 10 * domain) for split, (_, digit, domain) in made.items()}
    if task == "aligned":
        columns: dict[str, Any] = {
            split: AlignedColumns(
                {"image": ArrayImages(pixels), "text": [classes[c] for c in classed[split]]},
                classed[split],
                domains=domain,
            )
            for split, (pixels, _, domain) in made.items()
        }
        kinds = {"image": Modality("image", size=world.SIDE), "text": Modality("text")}
        return AlignedData("digit-domains", **columns, modalities=kinds, classes=classes, domains=tuple(names))
    splits: dict[str, Any] = {
        split: ArrayImages(pixels, classed[split], domains=domain) for split, (pixels, _, domain) in made.items()
    }
    return ImageData("digit-domains", **splits, classes=classes, size=world.SIDE, domains=tuple(names))
