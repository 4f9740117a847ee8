"""`brains`: slices of brain volumes with grey and white matter, made of the template that the package nilearn brings.

The package has the mean T1 picture of 152 adults (ICBM 2009a, 1 mm). Beside it are probability maps of grey and of white matter. A
subject is this template, turned, scaled and bent at random by a smooth field of a few millimetres. Tones, a bias field and noise
differ, too. The maps are bent like the picture. Then a voxel has the class of the largest probability: grey matter, white matter,
or neither. So classes never overlap, as nilearn's own binary masks do: at 2 mm they share 107,363 voxels. Of its grey mask, 2,200
voxels lie outside its brain mask.

The files are read, nilearn is never imported. Install it with `pip install --no-deps nilearn==0.14.1`; its licence is BSD, that of
the template is free use with attribution to the McConnell Brain Imaging Centre.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from counterpoint.data.dense import IGNORE, ArrayScenes, DenseData
from counterpoint.data.images import checked_size
from counterpoint.data.valid import checked_count
from counterpoint.errors import CounterpointError, DataError, needs_extra

REGIONS = ("background", "grey matter", "white matter")
FILES = {kind: f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")}
LOWEST, HIGHEST = 30.0, 150.0  # mm above the template's lowest voxel, between which the slices lie
SIDE = 233.0  # mm, of a slice
CELLS = 4  # of the field that bends a subject, along each axis


def load(
    argument: None = None,
    *,
    task: str = "dense",
    train: int = 12,
    labelled: int = -1,
    valid: int = -1,
    test: int = 4,
    slices: int = 16,
    size: int = 64,
    bend: float = 4.0,
    seed: int = 0,
) -> DenseData:
    """Make the subjects (a few seconds).

    Args:
        argument: not used; sources share a signature.
        task: "dense", or "views" to learn from the pictures; the result is the same.
        train: number of training subjects, at least 1.
        labelled: number of training subjects with masks, 1 to `train`; -1: all.
        valid: number of valid subjects; -1 for one.
        test: number of test subjects, at least 1.
        slices: axial slices of a subject from feet to head, at least 2.
        size: height and width of a slice in pixels, 8 to 4096; a slice is 233 mm wide.
        bend: deviation of the field that bends a subject, in mm, at least 0.
        seed: seed of the subjects, at least 0.

    Raises CounterpointError for an option out of range, DataError where nilearn is not installed.
    """
    checked_size(size)
    if (
        train < 1
        or test < 1
        or slices < 2
        or seed < 0
        or not 0 <= bend <= 50
        or not (labelled == -1 or 1 <= labelled <= train)
    ):
        raise CounterpointError(
            "brains: train and test are at least 1, slices at least 2, seed at least 0. The bend lies in 0..50, and labelled is "
            f"-1 or 1 to train; got {train=}, {test=}, {slices=}, {seed=}, {bend=}, {labelled=}"
        )
    spacing = [(HIGHEST - LOWEST) / (slices - 1), SIDE / size, SIDE / size]
    splits = []
    for number, count in enumerate((train, checked_count("brains", valid, 1), test)):
        made = [_subject(np.random.default_rng([2009, seed, number, n]), slices, size, bend) for n in range(count)]
        masks = np.concatenate([mask for _, mask in made])
        if number == 0 and labelled > 0:
            masks[labelled * slices :] = IGNORE
        pixels, groups = np.concatenate([picture for picture, _ in made]), np.repeat(np.arange(count), slices)
        splits.append(ArrayScenes(pixels, masks, groups=groups, spacings=np.array([spacing] * count)))
    return DenseData("brains", splits[0], splits[1], splits[2], (), size, regions=REGIONS)


@functools.cache
def template() -> dict[str, Float[np.ndarray, "x y z"]]:
    """Read the template's picture and both maps, 0 to 1. Axes go to the right, the front and the head; voxels are 1 mm apart.

    Raises DataError where nilearn is not installed, or a file is missing; CounterpointError for a missing extra.
    """
    package = find_spec("nilearn")
    if package is None or package.origin is None:
        raise DataError(
            "brains: reads the files that the package nilearn brings: pip install --no-deps nilearn==0.14.1"
        )
    try:
        import nibabel
    except ImportError as error:
        raise needs_extra("brains:", "dense") from error
    folder, found = Path(package.origin).parent / "datasets" / "data", {}
    for kind, name in FILES.items():
        try:
            image: Any = nibabel.as_closest_canonical(nibabel.load(folder / name))
            found[kind] = np.asarray(image.dataobj, np.float32) / 255
        except OSError as error:
            raise DataError(
                f"{folder / name}: cannot be read ({type(error).__name__}); install nilearn 0.14.1 again"
            ) from error
    return found


def _subject(
    rng: np.random.Generator, slices: int, size: int, bend: float
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one subject: slices [slices, size, size] in grey with the front up, and their class numbers."""
    from scipy.ndimage import map_coordinates, zoom

    maps = template()
    # Where each voxel of the subject lies in the template, in mm: [3, slices, size, size], axes right, front, head.
    along = (np.arange(size) + 0.5) / size * SIDE
    centre = np.array(maps["t1"].shape) / 2
    head, front, right = np.meshgrid(np.linspace(LOWEST, HIGHEST, slices), along[::-1], along, indexing="ij")
    at = np.stack([right - SIDE / 2, front - SIDE / 2, head - centre[2]])
    turn = np.eye(3) * rng.uniform(0.93, 1.07, 3) + np.cross(np.eye(3), rng.normal(0, 0.05, 3))
    at = np.einsum("ij,j...->i...", turn, at) + centre[:, None, None, None]
    shape = (slices, size, size)
    at += np.stack([zoom(rng.normal(0, bend, (CELLS,) * 3), [n / CELLS for n in shape], order=3) for _ in range(3)])
    picture, grey, white = (map_coordinates(maps[kind], at, order=1) for kind in FILES)
    mask = np.stack([1 - grey - white, grey, white]).argmax(0).astype(np.uint8)
    bias = 1 + zoom(rng.normal(0, 0.08, (CELLS,) * 3), [n / CELLS for n in shape], order=3)
    tone = picture ** rng.uniform(0.8, 1.25) * bias * rng.uniform(0.85, 1.1) + rng.normal(0, 0.02, shape)
    return np.rint(255 * tone.clip(0, 1)).astype(np.uint8), mask
