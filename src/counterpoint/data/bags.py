"""The contract of bag data: the form that every source for the task `bags` returns (numpy only, no torch).

A *bag* is a video cut into T snippets; each snippet has one visual and one audio feature row. Training bags carry only a
video-level label. Test videos also carry a frame-level truth, and so do valid videos where it is known.
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
    """One training item: a video, or one spatial crop of it, with its video-level label."""

    name: str
    visual: FloatArray  # [T, visual_dim]
    audio: FloatArray  # [T, audio_dim], same T
    label: int  # 1: the event happens somewhere in the video, 0: nowhere


@dataclass(frozen=True)
class TestVideo:
    """One video for evaluation: C spatial crops of its visual features, one audio track, and the truth per frame.

    A valid video may have only a video-level label. Then every frame of a video with the event counts as the event.
    """

    __test__ = False  # not a pytest class

    name: str
    visual: FloatArray  # [C, T, visual_dim]
    audio: FloatArray  # [T, audio_dim]
    label: int
    truth: NDArray[np.int8]  # [T * frames_per_snippet], 1 where the event is going on


@dataclass(frozen=True)
class BagData:
    """A source's three splits, and the facts needed to read them.

    `train[i]`, `valid[i]` and `test[i]` may read from disk on access, so that a large set need not fit in memory.
    """

    name: str
    train: Sequence[Bag]
    valid: Sequence[TestVideo]  # to monitor training and to choose settings
    test: Sequence[TestVideo]  # evaluated once, at the end
    visual_dim: int
    audio_dim: int
    frames_per_snippet: int = 16
    snippet_seconds: float = 16 / 24
    # The encoders that made the features, as `encoders.describe` writes them; None for features made elsewhere.
    backbones: dict[str, Any] | None = None
    # Remarks for the user on this data: repairs made, files left out.
    notes: list[str] = field(default_factory=list)


class LazyItems(Sequence[T]):
    """A sequence that makes an item on each access and does not keep it.

    Args:
        count: number of items.
        make: position -> item.
    """

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
