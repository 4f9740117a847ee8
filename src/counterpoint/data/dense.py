"""The contract of dense data: pictures, a class for each of their pixels, and boxes (numpy only, no torch).

`DenseData` is `ImageData` with masks, so every system of pictures can learn from its pictures. Each split also implements
`DenseSplit`. A mask has a class number for each pixel, or `IGNORE` where the class is unknown. Masks are never interpolated:
they are scaled by the nearest pixel. A picture without a mask has IGNORE everywhere, so it is a picture without labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import ArrayImages, ImageData, ImageSplit, Indices, Pixels
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.errors import DataError

IGNORE = 255  # class number of a pixel whose class is unknown
MOST = 255  # maximum number of classes, 0 to 254


class Boxes(NamedTuple):
    """The objects in a picture, k of them."""

    corners: NDArray[np.float32]  # [k, 4] left, top, right, bottom in pixels; right and bottom are exclusive
    labels: Indices  # [k] class numbers
    identities: Indices  # [k] numbers that identify an object in its scene or clip


@runtime_checkable
class DenseSplit(ImageSplit, Protocol):
    """One split of pictures with masks. `images` returns the first modality."""

    def masks(self, indices: Indices) -> Pixels:
        """Return the masks at [n] positions: [n, size, size] class numbers, IGNORE where unknown."""
        ...

    def boxes(self, indices: Indices) -> list[Boxes] | None:
        """Return the objects of the pictures at [n] positions; None where the data have no boxes."""
        ...

    def modality(self, name: str, indices: Indices) -> Pixels:
        """Return one modality of the pictures at [n] positions: [n, size, size, 3] RGB."""
        ...

    def present(self, name: str) -> NDArray[np.bool_]:
        """Return [len] whether an item has this modality. Where it has not, the picture is black."""
        ...

    @property
    def groups(self) -> Indices | None:
        """[len] numbers of the volumes or clips that pictures are slices of; None for single pictures."""
        ...

    @property
    def captions(self) -> list[str] | None:
        """[len] a sentence about each picture; None where the data have none (see `sentences`)."""
        ...


@dataclass(frozen=True)
class DenseData(ImageData):
    """Three `DenseSplit`s, and the facts needed to read them. `classes` are classes of whole pictures, usually none."""

    train: DenseSplit
    valid: DenseSplit
    test: DenseSplit
    regions: tuple[str, ...] = ()  # names of the pixels' classes; number 0 is the background where there is one
    modalities: tuple[str, ...] = ("image",)
    background: bool = True  # whether class 0 is the background, which the mean Dice leaves out

    @property
    def spec(self) -> dict[str, object]:
        """The facts that a learner is built from, ready for JSON."""
        return super().spec | {
            "regions": list(self.regions),
            "modalities": list(self.modalities),
            "background": self.background,
            "domains": list(self.domains),
        }


class ArrayScenes(ArrayImages):
    """A split in memory: a `DenseSplit`.

    Args:
        pixels: [N, H, W, 3] uint8 of each modality, by name; the first one is the picture that systems of one modality use.
            An array alone is the modality "image".
        masks: [N, H, W] uint8 class numbers, IGNORE where unknown.
        boxes: the objects of each picture. Default: no boxes.
        groups: [N] numbers of volumes or clips. Default: single pictures.
        present: [N] whether an item has a modality, by name. Default: every item has it.
        captions: a sentence about each picture. Default: none.
        domains: [N] numbers of `DenseData.domains`, such as kinds of imaging, -1 for none. Default: no domains.
        spacings: [volumes, 3] distances between the slices of each volume in `groups`, and between their pixels down and across, in
            mm. Default: the groups are no volumes.

    Raises DataError for arrays of another type or shape.
    """

    def __init__(
        self,
        pixels: Pixels | Mapping[str, Pixels],
        masks: Pixels,
        boxes: list[Boxes] | None = None,
        groups: Indices | None = None,
        present: Mapping[str, NDArray[np.bool_]] | None = None,
        captions: list[str] | None = None,
        domains: Indices | None = None,
        spacings: NDArray[np.float64] | None = None,
    ) -> None:
        self.by_name = dict(pixels) if isinstance(pixels, Mapping) else {"image": pixels}
        first = next(iter(self.by_name.values()))
        super().__init__(first, domains=domains)
        if masks.dtype != np.uint8 or masks.shape != first.shape[:3]:
            raise DataError(
                f"masks must be uint8 {list(first.shape[:3])} like the pictures, got {masks.dtype} {list(masks.shape)}"
            )
        for name, value in self.by_name.items():
            if value.dtype != np.uint8 or value.shape != first.shape:
                raise DataError(
                    f"modality {name} must be uint8 {list(first.shape)}, got {value.dtype} {list(value.shape)}"
                )
        self._masks, self._boxes, self.has = masks, boxes, dict(present or {})
        self.groups, self.captions, self.spacings = groups, captions, spacings

    def masks(self, indices: Indices) -> Pixels:
        return self._masks[indices]

    def boxes(self, indices: Indices) -> list[Boxes] | None:
        return None if self._boxes is None else [self._boxes[int(n)] for n in indices]

    def modality(self, name: str, indices: Indices) -> Pixels:
        found = self.by_name[name][indices]
        return found if found.ndim == 4 else np.repeat(found[..., None], 3, axis=3)

    def present(self, name: str) -> NDArray[np.bool_]:
        return self.has.get(name, np.ones(len(self), bool))


class OneModality:
    """One modality of a `DenseSplit` as an `ImageSplit`, without labels."""

    labels = None

    def __init__(self, split: DenseSplit, name: str) -> None:
        self.split, self.name = split, name

    def __len__(self) -> int:
        return len(self.split)

    def images(self, indices: Indices) -> Pixels:
        return self.split.modality(self.name, indices)


def sentences(split: DenseSplit, regions: Sequence[str]) -> list[str]:
    """Return a sentence about each picture: its caption, else the names of the classes in its mask.

    Args:
        split: a split of pictures with masks.
        regions: names of the pixels' classes.

    A picture whose mask is unknown is "a scene".
    """
    if split.captions is not None:
        return list(split.captions)
    found = []
    for row in range(len(split)):
        present = np.unique(split.masks(np.array([row])))
        found.append(sentence([regions[number] for number in present[present != IGNORE]]))
    return found


def sentence(names: Sequence[str]) -> str:
    """Write a sentence about the classes of a picture.

    >>> sentence(["road", "tree", "car"])
    'a scene with road, tree and car'
    """
    if not names:
        return "a scene"
    return "a scene with " + (f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0])


def aligned_scenes(data: DenseData) -> AlignedData:
    """Return the modalities of pictures with masks as aligned data, with a sentence as the modality "text".

    CLIP learns from it how well each modality agrees with the sentence. Raises DataError for a modality of the name "text".
    """
    if "text" in data.modalities:
        raise DataError(f"{data.name}: a folder of pictures has the name text, which the sentences need; rename it")
    splits = []
    for split in (data.train, data.valid, data.test):
        columns: dict[str, Any] = {name: OneModality(split, name) for name in data.modalities}
        columns["text"] = sentences(split, data.regions)
        there = {name: split.present(name) for name in data.modalities}
        splits.append(AlignedColumns(columns, presence=there))
    kinds = {name: Modality("image", size=data.size) for name in data.modalities} | {"text": Modality("text")}
    return AlignedData(data.name, splits[0], splits[1], splits[2], kinds, notes=data.notes, accounts=data.accounts)


def labelled_rows(split: DenseSplit) -> Indices:
    """Return the positions of the pictures with at least one pixel of known class."""
    found = [
        start + np.flatnonzero((split.masks(np.arange(start, min(start + 256, len(split)))) != IGNORE).any((1, 2)))
        for start in range(0, len(split), 256)
    ]
    return np.concatenate(found or [np.empty(0, np.int64)]).astype(np.int64)


def hidden(masks: Pixels, labelled: int) -> Pixels:
    """Return masks of which the first `labelled` are kept; the others are IGNORE. -1 keeps all."""
    if labelled < 0 or labelled >= len(masks):
        return masks
    found = np.full_like(masks, IGNORE)
    found[:labelled] = masks[:labelled]
    return found
