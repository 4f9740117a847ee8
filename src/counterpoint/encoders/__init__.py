"""Frozen feature backbones for video snippets, by name. Importing this package does not import torch.

A backbone turns a batch of snippets into feature rows. A run records the two it was trained on (`describe`), and
detection rebuilds exactly those (`build_visual`, `build_audio`).

    name          modality  dim   weights
    light         visual    see encoders/light.py; needs none
    r3d_18, ...   visual    512 / 768 ...  torchvision's video models: weights="DEFAULT" downloads, or a file on disk
    logmel        audio     128   needs none
    vggish        audio     128   a file on disk
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from counterpoint.errors import unknown


class VisualBackbone(Protocol):
    """Frames to features. `frame_size` is the (width, height) it wants frames handed over in."""

    name: str
    dim: int
    frames_per_snippet: int
    frame_size: tuple[int, int]

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[N, frames_per_snippet, H, W, 3] uint8 RGB -> [N, dim]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `build_visual` needs to build the same backbone again (name, weights file and its SHA-256)."""
        ...


class AudioBackbone(Protocol):
    """Sound to features. `window_seconds` is the length of sound it hears for a snippet; the window ends with the snippet."""

    name: str
    dim: int
    sample_rate: int
    window_seconds: float

    def __call__(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, round(window_seconds * sample_rate)] mono in [-1, 1] -> [N, dim]."""
        ...

    def describe(self) -> dict[str, Any]: ...
