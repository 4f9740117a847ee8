"""The contract of bag data: what every source for the task `bags` hands over (numpy only, no torch).

A *bag* is a video cut into T snippets; each snippet has one visual and one audio feature row. Training bags carry a
video-level label only; test videos, and valid videos where it is known, also carry a frame-level truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True)
class Bag:
    """One training item: one video (or one spatial crop of it) with its video-level label."""

    name: str
    visual: FloatArray  # [T, visual_dim]
    audio: FloatArray  # [T, audio_dim], same T
    label: int  # 1: the event happens somewhere in the video, 0: nowhere


@dataclass(frozen=True)
class TestVideo:
    """One video that is measured on: C spatial crops of its visual features, one audio track, and the truth per frame.

    A valid video may have a video-level label only. Then every frame of a video with the event counts as the event.
    """

    __test__ = False  # not a pytest class

    name: str
    visual: FloatArray  # [C, T, visual_dim]
    audio: FloatArray  # [T, audio_dim]
    label: int
    truth: NDArray[np.int8]  # [T * frames_per_snippet], 1 where the event is going on


@dataclass(frozen=True)
class BagData:
    """A source's three splits and what is needed to read them.

    `train[i]` may read from disk when asked for (so a large set is never held in memory); so may `valid[i]` and `test[i]`.
    """

    name: str
    train: Sequence[Bag]
    valid: Sequence[TestVideo]  # training is watched on it, and settings are chosen on it
    test: Sequence[TestVideo]  # measured once, at the end
    visual_dim: int
    audio_dim: int
    frames_per_snippet: int = 16
    snippet_seconds: float = 16 / 24
    # How the features were made, as `encoders.describe` writes it; None when they came ready-made from elsewhere.
    backbones: dict[str, Any] | None = None
    # What the user should know about this data: repairs made, files left out.
    notes: list[str] = field(default_factory=list)


class LazyItems(Sequence[T]):
    """A sequence whose items are made when asked for, and not kept."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self.size, self.make = count, make

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(index)
        return self.make(index % self.size)
