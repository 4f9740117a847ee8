"""`cifar10`: the CIFAR-10 photographs, 32 x 32 pixels, ten classes.

The source looks for the set in this order:

    cifar10:DIR                a folder with the standard download, unpacked (cifar-10-batches-py) or not
    $COUNTERPOINT_DATA         cifar10-12k.npz in it: a subset of 10,000 + 2,000 (arrays train_images [N, 32, 32, 3],
                               train_labels [N], test_images, test_labels, classes)
    the cache folder           the standard download, fetched by torchvision on first use: 50,000 + 10,000

The valid split is a tenth of the training pictures, with the same proportion of each class.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from counterpoint.data.images import ArrayImages, ImageData, long_tailed
from counterpoint.data.valid import SHARE, by_content, carve, checked_share
from counterpoint.errors import DataError
from counterpoint.files import cache_folder
from counterpoint.words import counted

SUBSET = "cifar10-12k.npz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load(directory: str | None = None, *, valid: float = SHARE, imbalance: float = 0.0, seed: int = 0) -> ImageData:
    """Open the set.

    Args:
        directory: folder of the set. Default: $COUNTERPOINT_DATA, else the cache, downloaded on first use.
        valid: share of the training pictures in the valid split, the same for every class. Equal pictures stay together.
        imbalance: ratio of aeroplanes to trucks of a long-tailed training split (see `images.long_tailed`). 0 keeps all
            pictures. 100 is the usual long-tailed CIFAR.
        seed: chooses the pictures that a long-tailed split keeps.

    Raises DataError when the set is damaged, or is neither found nor downloaded.
    """
    checked_share("cifar10", valid)
    whole, test, classes, notes = _load(directory)
    assert whole.labels is not None
    rows = np.arange(len(whole))
    rows, watched = carve("cifar10", rows, valid, whole.labels, by_content(whole.pixels))
    if imbalance:
        rows = rows[long_tailed(whole.labels[rows], imbalance, seed)]
    train, valid_images = (ArrayImages(whole.pixels[part], whole.labels[part]) for part in (rows, watched))
    return ImageData("cifar10", train, valid_images, test, classes, 32, notes)


# Training pictures, test pictures, classes and notes.
Found = tuple[ArrayImages, ArrayImages, tuple[str, ...], list[str]]


def _load(directory: str | None) -> Found:
    if directory is not None:
        root = Path(directory)
        if not root.is_dir():
            raise DataError(f"{root}: no such directory; it should hold cifar-10-batches-py or cifar-10-python.tar.gz")
        if (root / SUBSET).is_file():
            return _subset(root / SUBSET)
        if root.name == "cifar-10-batches-py":
            root = root.parent
        return _standard(root, download=(root / "cifar-10-python.tar.gz").is_file())
    place = os.environ.get("COUNTERPOINT_DATA")
    if place and (Path(place) / SUBSET).is_file():
        return _subset(Path(place) / SUBSET)
    return _standard(cache_folder() / "cifar10", download=True)


def _subset(file: Path) -> Found:
    try:
        with np.load(file, allow_pickle=False) as stored:
            splits = {
                split: ArrayImages(stored[f"{split}_images"], stored[f"{split}_labels"]) for split in ("train", "test")
            }
            classes = tuple(str(name) for name in stored["classes"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, DataError) as error:
        raise DataError(
            f"{file}: does not hold the expected arrays ({error}); counterpoint/data/cifar10.py lists them"
        ) from error
    notes = [
        f"{file}: a subset of {len(splits['train'])} + {counted(len(splits['test']), 'image')} of CIFAR-10's 50000 + 10000"
    ]
    return splits["train"], splits["test"], classes, notes


def _standard(root: Path, *, download: bool) -> Found:
    """Read the standard download under `root`; torchvision checks its MD5 sums."""
    from torchvision.datasets import CIFAR10

    try:
        sets = {
            split: CIFAR10(os.fspath(root), train=split == "train", download=download) for split in ("train", "test")
        }
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{root}: holds no CIFAR-10, and the download failed ({said}). Get cifar-10-python.tar.gz from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and name its folder: --data cifar10:DIR"
        ) from error
    splits = {
        name: ArrayImages(np.asarray(found.data), np.array(found.targets, np.int64)) for name, found in sets.items()
    }
    return splits["train"], splits["test"], CLASSES, []
