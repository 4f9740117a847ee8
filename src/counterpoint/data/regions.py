"""The contract of regions: pictures of two domains with proposals, boxes that may hold an object (numpy only, no torch).

The training split has pictures of the source (domain 0), whose proposals have classes, and of the target (domain 1). Classes of
the target's proposals serve measures alone. A proposal has the class of the object that it meets with an IoU of at least 0.5.
Else it is background, whose number is the number of classes. Every picture has the same number of proposals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import Accounts
from counterpoint.data.dense import Boxes
from counterpoint.data.images import Indices, Pixels
from counterpoint.errors import DataError
from counterpoint.words import counted

SOURCE, TARGET = 0, 1
UNKNOWN = -1  # class of a proposal in a picture without boxes
MATCH = 0.5  # least IoU of a proposal and its object
OBJECTS = 0.6  # share of the proposals that are drawn around objects
REACH = 0.2  # standard deviation of a drawn box's centre and size, in shares of the object's size


class Proposals(NamedTuple):
    """The proposals of a picture, n of them."""

    corners: NDArray[np.float32]  # [n, 4] left, top, right, bottom in pixels
    labels: Indices  # [n] class numbers, the number of classes for the background, UNKNOWN
    scores: NDArray[np.float32]  # [n] logits of objectness


@runtime_checkable
class RegionSplit(Protocol):
    """One split of pictures with proposals. Positions are stable."""

    domains: Indices  # [len] SOURCE or TARGET

    def __len__(self) -> int: ...

    def images(self, indices: Indices) -> Pixels:
        """Return the pictures at [n] positions: [n, size, size, 3] RGB."""
        ...

    def proposals(self, index: int) -> Proposals:
        """Return the proposals of a picture."""
        ...


@dataclass(frozen=True)
class RegionData:
    """A source's three splits, and the facts needed to read them. `valid` and `test` are of the domain that is measured."""

    name: str
    train: RegionSplit
    valid: RegionSplit
    test: RegionSplit
    size: int  # pixels, height and width of a picture
    count: int  # proposals of a picture
    classes: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    accounts: Accounts | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        return {
            "size": self.size,
            "channels": 3,
            "classes": len(self.classes),
            "class_names": list(self.classes),
            "proposals": self.count,
        }


class ArrayRegions:
    """A split in memory (a `RegionSplit`).

    Args:
        pixels: [N, size, size, 3] uint8.
        found: the proposals of each picture.
        domains: [N] SOURCE or TARGET.

    Raises DataError for arrays that do not fit.
    """

    def __init__(self, pixels: Pixels, found: list[Proposals], domains: Indices) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise DataError(f"pixels must be uint8 [N, size, size, 3], got {pixels.dtype} {list(pixels.shape)}")
        if not len(pixels) == len(found) == len(domains):
            raise DataError(
                f"{counted(len(pixels), 'picture has', 'pictures have')} {counted(len(found), 'list')} of proposals and "
                f"{counted(len(domains), 'domain')}"
            )
        self.pixels, self.found, self.domains = pixels, found, domains

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Indices) -> Pixels:
        return self.pixels[indices]

    def proposals(self, index: int) -> Proposals:
        return self.found[int(index)]


def iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute the intersection over union [n, m] of boxes [n, 4] and [m, 4].

    >>> iou(np.array([[0, 0, 2, 2]], np.float32), np.array([[0, 0, 2, 1]], np.float32))
    array([[0.5]], dtype=float32)
    """
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    area_a, area_b = (np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (a, b))
    return (shared / np.maximum(area_a[:, None] + area_b - shared, 1e-9)).astype(np.float32)


def drawn_proposals(
    rng: np.random.Generator, boxes: Boxes, count: int, size: tuple[int, int], background: int
) -> Proposals:
    """Draw proposals: boxes around the objects, displaced and rescaled, and boxes of the ground.

    The score imitates a proposal network's: it rises with the IoU of box and object, and is noisy. It does not depend on the
    class.

    Args:
        rng: source of all random numbers.
        boxes: the objects; their labels are numbers from 0 to background - 1.
        count: number of proposals.
        size: width and height of the picture in pixels.
        background: class number of the background.
    """
    edge = np.array([*size, *size], np.float32)
    objects = boxes.corners.astype(np.float32)
    around = round(OBJECTS * count) if len(objects) else 0
    own = objects[np.arange(around) % max(1, len(objects))]
    sides = own[:, 2:] - own[:, :2]
    centre = (own[:, 2:] + own[:, :2]) / 2 + REACH / 2 * sides * rng.standard_normal((around, 2))
    half = sides * np.exp(REACH * rng.standard_normal((around, 2))) / 2
    ground = count - around
    # Boxes of the ground have the sizes of objects, where there are any.
    like = objects[rng.integers(len(objects), size=ground)] if len(objects) else np.zeros((ground, 4), np.float32)
    wide = like[:, 2:] - like[:, :2] if len(objects) else rng.uniform(0.15, 0.4, (ground, 2)) * edge[:2]
    wide = np.minimum(wide * np.exp(REACH * rng.standard_normal((ground, 2))), edge[:2])
    start = rng.random((ground, 2)) * (edge[:2] - wide)
    corners = np.concatenate(
        [np.concatenate([centre - half, centre + half], 1), np.concatenate([start, start + wide], 1)]
    )
    corners = np.clip(corners, 0, edge).astype(np.float32)
    least = np.minimum(corners[:, :2], edge[:2] - 1)  # no box is thinner than a pixel
    corners = np.concatenate([least, np.maximum(corners[:, 2:], least + 1)], 1)
    labels, best = matched_labels(corners, boxes, background)
    scores = (6 * best - 2 + rng.standard_normal(count)).astype(np.float32)
    order = rng.permutation(count)
    return Proposals(corners[order], labels[order], scores[order])


def matched_labels(corners: NDArray[np.float32], boxes: Boxes, background: int) -> tuple[Indices, NDArray[np.float32]]:
    """Return the class of each box by the object that it meets most, and its IoU with it."""
    labels, best = np.full(len(corners), background, np.int64), np.zeros(len(corners), np.float32)
    if len(boxes.corners):
        overlap = iou(corners, boxes.corners.astype(np.float32))
        best = overlap.max(1)
        matched = best >= MATCH
        labels[matched] = boxes.labels[overlap.argmax(1)[matched]]
    return labels, best


def grid_proposals(count: int, size: tuple[int, int]) -> Proposals:
    """Return squares on a grid in three sizes, for pictures without boxes; their classes are unknown and their scores 1.

    Args:
        count: number of proposals; the squares that lie first are taken.
        size: width and height of the picture in pixels.
    """
    wide, high = size
    found: list[tuple[float, float, float, float]] = []
    for share in (0.5, 0.33, 0.22, 0.15, 0.1, 0.06):
        side = share * min(size)
        xs, ys = (np.arange(0, length - side + 1e-6, side / 2) for length in (wide, high))
        found += [(x, y, x + side, y + side) for y in ys for x in xs]
        if len(found) >= count:
            break
    corners = np.array([found[n % len(found)] for n in range(count)], np.float32)
    return Proposals(corners, np.full(count, UNKNOWN, np.int64), np.ones(count, np.float32))
