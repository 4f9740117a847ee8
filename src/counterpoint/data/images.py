"""The contract of image data: the form that every source for the task `views` returns (numpy only, no torch).

Images are uint8 RGB squares of one size, read in batches by position. So the same number can index state that is kept for each
training example. `ArrayImages` holds images in memory; images of the user's own files are `own.contracts.OwnImages`.

A file becomes a square in these steps:

    1. Take the first frame of an animation.
    2. Turn it upright by its EXIF orientation.
    3. Convert any colour mode to RGB. Transparent parts become white. Greys of 16 bits are scaled to 8 bits. For greys of 32
       bits and of floating point, the largest value decides whether the range is 0..1, 0..255 or 0..65535.
    4. Cut out the largest centred square, and scale it to `size` with antialiasing. The result equals scaling the short side
       and cropping the centre.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from counterpoint.data.accounts import Accounts
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted

Indices = NDArray[np.int64]
Pixels = NDArray[np.uint8]

MAX_PIXELS = 89_478_485  # a picture with more is refused unread: Pillow's own limit for decompression bombs
KEEP = 1 << 30  # bytes: a split whose squares fit is read whole at once, so damaged files are found before training
_SHOWN = 10


@runtime_checkable
class ImageSplit(Protocol):
    """One split of an image set. Positions are stable: the same number is the same picture in every process and run."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Indices | None:
        """[len] class numbers, -1 for a picture without a class; None without labels."""
        ...

    def images(self, indices: Indices) -> Pixels:
        """Return the pictures at [n] positions: [n, size, size, 3] RGB. DataError names a file that can no longer be read."""
        ...


@runtime_checkable
class Listed(Protocol):
    """A split that names the file or row of each item. Every split of the user's files and tables is one."""

    def row_names(self, positions: Indices) -> list[str]:
        """Name the origin of each of n items.

        An item with a file to itself has the file's path as its name. A row of a table is "FILE row N", with N counted from 1.
        Where there is a path or key inside the file, it follows in brackets.
        """
        ...

    def files(self, positions: Indices, modality: str) -> list[str | None]:
        """Give the path on disk of each item's picture, sound or video; None where the item has none of its own.

        Args:
            positions: n positions in the split.
            modality: name of a modality; a split of pictures alone ignores it ("image").
        """
        ...


class Tags(NamedTuple):
    """Labels of which a picture may have several: [pictures, names] for each split, 1 where present, 0 where not."""

    names: tuple[str, ...]
    train: Indices
    valid: Indices
    test: Indices


class WebTexts(NamedTuple):
    """Texts found with training pictures, and a text for each class, such as its definition."""

    train: tuple[str, ...]  # "" where a picture has none
    definitions: tuple[str, ...]


@dataclass(frozen=True)
class ImageData:
    """A source's three splits, and the facts needed to read them."""

    name: str
    train: ImageSplit
    valid: ImageSplit  # to monitor training and to choose settings
    test: ImageSplit  # evaluated once, at the end
    classes: tuple[str, ...]  # empty without labels
    size: int  # pixels, height and width
    # Remarks for the user on this data: files left out, splits made.
    notes: list[str] = field(default_factory=list)
    channels: int = 3
    # More test splits by name, from other domains than the training split, such as unseen drawing styles.
    shifts: dict[str, ImageSplit] = field(default_factory=dict)
    # Names of the domains, such as styles or scanners, that pictures come from; the splits number them. Empty without domains.
    domains: tuple[str, ...] = ()
    # Whether the domains are phases, to be learned one after another (see data/streams.py).
    stream: bool = False
    # Images whose features neighbours and probes use, and number of images in an epoch. None: those of the training split.
    # Set where a system has inflated the training split.
    bank: ImageSplit | None = None
    epoch: int | None = None
    # Further labels of a picture: name -> classes of training, valid and test split, -1 for none.
    attributes: dict[str, tuple[Indices, Indices, Indices]] = field(default_factory=dict)
    # Continuous causes of a picture: name -> [n, k] numbers of training, valid and test split.
    factors: dict[str, tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]] = field(
        default_factory=dict
    )
    # Labels of which a picture may have several.
    tags: Tags | None = None
    # Texts found with training pictures. None: no texts.
    texts: WebTexts | None = None
    # Pictures of another distribution, without labels or with labels that no learner may use.
    web: ImageSplit | None = None
    # Numbers found, read and left out, of sources that read the user's own files.
    accounts: Accounts | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        return {"size": self.size, "channels": self.channels, "classes": len(self.classes)}


class ArrayImages:
    """A split in memory: an `ImageSplit`.

    Args:
        pixels: [N, H, W, 3] uint8, or [N, H, W] grey, which is repeated over the channels when read.
        labels: [N] class numbers, -1 for none. Default: no labels.
        features: [N, dim] a teacher's features of the pictures, for sources that bring them. Default: none.
        domains: [N] numbers of `ImageData.domains`, -1 for none. Default: no domains.

    Raises DataError for pixels of another type or shape. Raises it too where labels, features or domains are not N.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: Indices | None = None,
        features: NDArray[np.float32] | None = None,
        domains: Indices | None = None,
    ) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[3] != 3):
            raise DataError(f"images must be uint8 [N, H, W, 3] or [N, H, W], got {pixels.dtype} {list(pixels.shape)}")
        self.pixels = pixels
        self.labels = checked_labels(labels, len(pixels))
        self.domains = checked_labels(domains, len(pixels))
        if features is not None and (features.ndim != 2 or len(features) != len(pixels)):
            raise DataError(f"features must be [{len(pixels)}, any number], got {list(features.shape)}")
        self.features = features

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Indices) -> Pixels:
        found = self.pixels[indices]
        return found if found.ndim == 4 else np.repeat(found[..., None], 3, axis=3)


def checked_labels(labels: Indices | None, count: int) -> Indices | None:
    """Return labels as int64 [count], or None; DataError for another shape."""
    if labels is None:
        return None
    labels = np.asarray(labels, dtype=np.int64)
    if labels.shape != (count,):
        raise DataError(f"labels have shape {list(labels.shape)}, expected [{count}]: one for each item")
    return labels


def checked_size(size: int) -> int:
    """Return a size in pixels; CounterpointError outside 8..4096."""
    if not 8 <= size <= 4096:
        raise CounterpointError(f"size is the pictures' height and width in pixels, 8 to 4096; got {size}")
    return size


# --- decoding ---------------------------------------------------------------------------------------------------------


def _open(source: Path | bytes | BinaryIO) -> Image.Image:
    """Open a picture and read its header. DataError gives the reason where that fails."""
    if isinstance(source, bytes) and not source:
        raise DataError("is empty (0 bytes)")
    # os.path's functions do not raise for a name that is too long or a folder without read permission.
    if isinstance(source, Path) and os.path.exists(source) and not os.path.isfile(source):
        raise DataError("is no file")  # such as a pipe, whose opening would block
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings on odd metadata; unreadable pictures are errors below
            # Pillow only warns between its limit and twice its limit; here both are errors.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"has more than {MAX_PIXELS // 10**6} million pixels, which may be an attack on memory; scale it down to use it"
        ) from error
    except FileNotFoundError as error:
        raise DataError("no such file") from error
    except Exception as error:  # Pillow's many plugins raise various errors on damaged headers
        if isinstance(source, Path) and os.path.isfile(source) and os.path.getsize(source) == 0:
            raise DataError("is empty (0 bytes)") from error
        raise DataError(f"not a picture that can be read ({_reason(error)})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million; scale it down to use it"
        )
    return image


def _reason(error: Exception) -> str:
    said = str(error).splitlines()[0] if str(error) else ""
    return "unknown format" if said.startswith("cannot identify") else said[:120] or type(error).__name__


def check_header(source: Path | bytes | BinaryIO) -> None:
    """Check the header of a picture, in a fraction of the time of decoding. DataError when this is no picture.

    Args:
        source: a path, the file's bytes, or an open file.
    """
    _open(source).close()


def decode(source: Path | bytes, size: int) -> Pixels:
    """Decode a picture, from its file or its bytes, to a [size, size, 3] square (see the module).

    Raises DataError with the reason where that fails.
    """
    with _open(source) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, in a fraction of the time.
            image.draft(None, (2 * size, 2 * size))
            return square(image, size)
        except DataError:
            raise
        except Exception as error:  # as above: codecs raise OSError, SyntaxError, ValueError, struct.error, zlib.error
            raise DataError(f"damaged or cut short ({_reason(error)})") from error


def decode_whole(source: Path | bytes, told: tuple[int, int] | None = None) -> Image.Image:
    """Decode a picture of any shape to RGB by the steps 1 to 3 of the module.

    Args:
        source: a path, or the file's bytes.
        told: width and height of the picture in a list of pictures. Where they are those of the stored picture alone, it is not
            turned, because the list counts pixels so. None (default): unknown.

    Raises DataError with the reason where decoding fails, and for a picture of another size.
    """
    with _open(source) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            upright = ImageOps.exif_transpose(image) or image
            shown = upright if told in (None, upright.size) else image
            if told not in (None, shown.size):
                wide, high = upright.size
                raise DataError(f"has {wide} x {high} pixels, the list says {told[0]} x {told[1]}")
            return _rgb(shown)
        except DataError:
            raise
        except Exception as error:  # as above
            raise DataError(f"damaged or cut short ({_reason(error)})") from error


def square(image: Image.Image, size: int) -> Pixels:
    """Return a Pillow image as a [size, size, 3] square (see the module). DataError for values that are not pixels."""
    upright = ImageOps.exif_transpose(image) or image
    rgb = _rgb(upright)
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    cut = rgb.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side), reducing_gap=None
    )
    return np.asarray(cut)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64)
        if not np.isfinite(grey).all():
            raise DataError("holds values that are not numbers")
        low, high = grey.min(initial=0), grey.max(initial=0)
        if low < 0 or high > 65535:
            raise DataError(
                f"holds values from {low:g} to {high:g}, outside the greys of 16 bits; scale them to 0..65535"
            )
        if image.mode == "F" and high <= 1:
            grey *= 255
        elif high > 255 or image.mode.startswith("I;16"):  # a dark picture of 16 bits is dark
            grey /= 257
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


# --- splits -----------------------------------------------------------------------------------------------------------


def some(items: Sequence[str], between: str = "; ") -> str:
    """Join the first few items of a list, and count the rest."""
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return between.join([*items[:_SHOWN], *more])


def long_tailed(labels: Indices, imbalance: float, seed: int = 0) -> Indices:
    """Return the positions that a long-tailed split keeps: of C classes, class c keeps n / imbalance^(c / (C - 1)) items.

    Args:
        labels: [N] class numbers from 0; n is the size of the smallest class.
        imbalance: ratio of the first class's size to the last one's, at least 1; 1 makes all classes equal.
        seed: chooses the items that stay.

    Returns sorted positions. Raises CounterpointError for an imbalance below 1 or a class without items.

    Source: long-tailed CIFAR (Cao et al. 2019, arXiv 1906.07413).
    """
    if not imbalance >= 1:
        raise CounterpointError(f"imbalance is at least 1, the first class over the last; got {imbalance}")
    counts = np.bincount(labels)
    if not len(counts) or not counts.min():
        raise CounterpointError("imbalance: a class has no items, so no proportion can be cut; set imbalance to 0")
    kept = counts.min() / imbalance ** (np.arange(len(counts)) / max(1, len(counts) - 1))
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = [members[: max(1, int(n))] for members, n in zip(_by_group(order, labels), kept, strict=True)]
    return np.sort(np.concatenate(chosen))


def _by_group(order: Indices, groups: Indices) -> list[Indices]:
    """Return the positions of each group, by the group's number, each in the given order. One sort serves all groups."""
    found = groups[order]
    at = found.argsort(kind="stable")
    return np.split(order[at], np.flatnonzero(np.diff(found[at])) + 1)


def split_positions(
    count: int, fraction: float, labels: Indices | None = None, together: Indices | None = None
) -> tuple[Indices, Indices]:
    """Cut positions into a training and a test split, the same on every machine, each class in the same proportion.

    `carve` cuts a valid split from the training split in the same way (data/valid.py).

    Args:
        count: number of items, at least 2.
        fraction: fraction of the items for the test split, between 0 and 1.
        labels: [count] class numbers; default: one class. A class with one item stays in training.
        together: [count] numbers; items of one number stay in one split. Proportions are then as near as possible.
            Default: items are independent.

    Returns the sorted positions of the training and of the test split. Raises CounterpointError for a fraction not in (0, 1);
    DataError when one of the splits would be empty.
    """
    if not 0 < fraction < 1:
        raise CounterpointError(f"the test split is a fraction between 0 and 1, or the name of a split; got {fraction}")
    # numpy's legacy generator gives the same stream on every platform and version.
    order = np.random.RandomState(0).permutation(count)
    groups = np.zeros(count, np.int64) if labels is None else np.asarray(labels)
    chosen = np.zeros(count, bool)
    if together is not None and not np.diff(np.sort(together)).all():
        chosen = _chosen_together(order, fraction, groups, together)
    else:
        for members in _by_group(order, groups):
            take = min(round(fraction * len(members)), len(members) - 1)
            chosen[members[:take]] = True
    train, test = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    if not len(train) or not len(test):
        raise DataError(
            f"{counted(count, 'item')} cannot be split into training and test ({fraction:g}); add more, or name a test split"
        )
    return train.astype(np.int64), test.astype(np.int64)


def _chosen_together(order: Indices, fraction: float, groups: Indices, together: Indices) -> NDArray[np.bool_]:
    """Choose the test items: go through the sets of `together` in random order, take each that brings the classes nearer.

    Args:
        order: [N] positions in random order.
        fraction: fraction of the items for the test split.
        groups: [N] class numbers.
        together: [N] numbers of the sets.

    Returns [N], true for a test item.
    """
    names, of_class = np.unique(groups, return_inverse=True)
    sizes = np.bincount(of_class)
    wanted = np.minimum(np.round(fraction * sizes), sizes - 1).astype(np.float64)
    if wanted.sum() < 1:  # such small classes allow no proportions
        names, of_class = names[:1], np.zeros_like(of_class)
        wanted = np.array([max(1.0, np.round(fraction * len(order)))])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    _, of_set = np.unique(together, return_inverse=True)
    first = np.full(int(of_set.max()) + 1, len(order))
    np.minimum.at(first, of_set, rank)
    items = np.lexsort((rank, first[of_set]))  # sets in the order of their first items
    starts = np.flatnonzero(np.diff(of_set[items], prepend=-1))
    classes, have, goal = of_class[items].tolist(), [0.0] * len(wanted), wanted.tolist()
    taken: list[int] = []
    smallest = (len(order) + 1, 0)
    for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(items)], strict=True):
        counts = Counter(classes[begin:end])
        # Nearer in the sum of squares.
        if sum(n * (n - 2 * (goal[c] - have[c])) for c, n in counts.items()) < 0:
            taken += range(begin, end)
            for c, n in counts.items():
                have[c] += n
        else:
            smallest = min(smallest, (end - begin, begin))
    if not taken and smallest[0] < len(order):
        taken = list(range(smallest[1], sum(smallest)))
    chosen = np.zeros(len(order), bool)
    chosen[items[taken]] = True
    return chosen
