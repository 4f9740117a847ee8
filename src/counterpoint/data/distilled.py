"""Write and read a distilled set: synthetic pictures with a target vector for each.

set.npz, set.safetensors   pictures float32 [m, 3, size, size] as networks take them, targets float32 [m, k]
a folder                   0000.png, 0001.png, ... (values cut to 0..255), and set.safetensors
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import check_writable, replacing

ENDINGS = (".npz", ".safetensors")


class DistilledSet(NamedTuple):
    """Synthetic pictures and their targets."""

    pictures: NDArray[np.float32]  # [m, 3, size, size]
    targets: NDArray[np.float32]  # [m, k]


def write_set(found: DistilledSet, shown: NDArray[np.uint8], out: Path | str) -> list[Path]:
    """Write a distilled set. Return the files.

    Args:
        found: the set.
        shown: [m, size, size, 3] the pictures as bytes, for PNG files.
        out: a file that ends in .npz or .safetensors, or a folder, which gets a PNG file of each picture and set.safetensors.

    Raises CounterpointError for a file that cannot be written.
    """
    out = Path(out)
    if out.suffix in ENDINGS:
        check_writable(out)
        content = io.BytesIO()
        if out.suffix == ".npz":
            np.savez(content, **found._asdict())
        else:
            from safetensors.numpy import save

            content.write(save({name: np.ascontiguousarray(part) for name, part in found._asdict().items()}))
        with replacing(out) as file:
            file.write(content.getvalue())
        return [out]
    if out.suffix:
        raise CounterpointError(
            f"{out}: a set of pictures goes into a folder, or a file that ends in .npz or .safetensors"
        )
    files = write_set(found, shown, out / "set.safetensors")
    digits = max(4, len(str(len(shown) - 1)))
    for number, pixels in enumerate(shown):
        files.append(out / f"{number:0{digits}}.png")
        with replacing(files[-1]) as file:
            Image.fromarray(pixels).save(file, "PNG")
    return files


def read_set(path: Path | str, size: int) -> DistilledSet:
    """Read a distilled set that `write_set` wrote, a file or a folder.

    Args:
        path: the file, or the folder with set.safetensors.
        size: height and width that its pictures must have, in pixels.

    Raises DataError for a file that is missing or holds no such set.
    """
    path = Path(path) / "set.safetensors" if Path(path).is_dir() else Path(path)
    if path.suffix not in ENDINGS:
        raise DataError(f"{path}: a distilled set is a folder, or a file that ends in .npz or .safetensors")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as held:
                pictures, targets = held["pictures"], held["targets"]
        else:
            from safetensors.numpy import load_file

            stored = load_file(path)
            pictures, targets = stored["pictures"], stored["targets"]
    except Exception as error:  # of any kind: the message must name the file
        raise DataError(f"{path} holds no distilled set ({type(error).__name__}: {error})") from error
    if pictures.ndim != 4 or targets.ndim != 2 or len(pictures) != len(targets) or not len(targets):
        raise DataError(
            f"{path}: expected pictures [m, 3, size, size] and targets [m, k], got {pictures.shape}, {targets.shape}"
        )
    if pictures.shape[1:] != (3, size, size):
        raise DataError(f"{path} has pictures of shape {list(pictures.shape[1:])}, this data has {[3, size, size]}")
    for name, part in (("pictures", pictures), ("targets", targets)):
        if not np.isfinite(part).all():
            raise DataError(f"{path}: its {name} hold NaN or infinite values")
    return DistilledSet(pictures.astype(np.float32), targets.astype(np.float32))
