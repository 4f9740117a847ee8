"""The contract of clips: frames with detected instances, each a crop of its frame (numpy only, no torch).

A clip has T frames with at most Q detections each. A detection has a crop, a score, and the number of its instance in the clip:
-1 for a detection of no instance (background, a part of something), -2 for no detection (padding).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import Accounts
from counterpoint.data.images import Indices, Pixels
from counterpoint.errors import DataError

OTHER, PADDING = -1, -2  # identities of detections of no instance, and of no detection


class Clip(NamedTuple):
    """The detections of a clip, in any order within a frame."""

    crops: Pixels  # [T, Q, size, size, 3] RGB
    identities: Indices  # [T, Q] instance numbers, OTHER or PADDING
    scores: NDArray[np.float32]  # [T, Q] confidence, 0..1; 0 for padding


@runtime_checkable
class ClipSplit(Protocol):
    """One split of clips. Positions are stable."""

    def __len__(self) -> int: ...

    @property
    def frames(self) -> Indices:
        """[len] number of frames of each clip."""
        ...

    def clip(self, index: int) -> Clip:
        """Return the detections of a clip."""
        ...


@dataclass(frozen=True)
class ClipData:
    """A source's three splits, and the facts needed to read them."""

    name: str
    train: ClipSplit
    valid: ClipSplit  # to monitor training and to choose settings
    test: ClipSplit  # evaluated once, at the end
    size: int  # pixels, height and width of a crop
    classes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    accounts: Accounts | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        return {"size": self.size, "channels": 3, "classes": len(self.classes)}


class ArrayClips:
    """A split in memory (a `ClipSplit`).

    Args:
        clips: the clips.

    Raises DataError for arrays that do not fit.
    """

    def __init__(self, clips: list[Clip]) -> None:
        for number, clip in enumerate(clips):
            shape = clip.crops.shape
            if clip.crops.dtype != np.uint8 or len(shape) != 5 or shape[4] != 3:
                raise DataError(f"clip {number}: crops must be uint8 [T, Q, size, size, 3], got {list(shape)}")
            if clip.identities.shape != shape[:2] or clip.scores.shape != shape[:2]:
                raise DataError(f"clip {number}: identities and scores must be [{shape[0]}, {shape[1]}]")
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def frames(self) -> Indices:
        return np.array([len(clip.crops) for clip in self.clips], np.int64)

    def clip(self, index: int) -> Clip:
        return self.clips[index]
