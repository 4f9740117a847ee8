"""The contract of texts: the form that every source for the task `tokens` returns (numpy only, no torch).

A text may have a clip, the features of a video at successive seconds. A split may know attributes of words, such as the size of the
objects that they name. They serve the evaluation alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class TokenSplit:
    """Texts in order. Positions are stable: the same number is the same text in every process and run."""

    texts: Sequence[str]
    clips: Sequence[FloatArray] | None = None  # of each text [seconds, width]
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # attribute -> word -> its level

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TokenData:
    """A source's splits, and the facts needed to read them."""

    name: str
    train: TokenSplit  # texts alone
    valid: TokenSplit  # to monitor training and to choose settings
    test: TokenSplit  # evaluated once, at the end
    grounded: TokenSplit | None = None  # texts with clips, for training
    # Remarks for the user on this data: rows left out, splits made.
    notes: list[str] = field(default_factory=list)

    @property
    def clip_dim(self) -> int:
        """The width of a clip's rows; 0 without clips."""
        clips = None if self.grounded is None else self.grounded.clips
        return int(clips[0].shape[1]) if clips is not None and len(clips) else 0

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        return {
            "examples": len(self.train),
            "pairs": 0 if self.grounded is None else len(self.grounded),
            "clip_dim": self.clip_dim,
            "probed": bool(self.valid.attributes),
        }
