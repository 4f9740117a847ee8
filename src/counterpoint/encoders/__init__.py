"""Frozen feature backbones for video snippets, by name. Importing this package does not import torch.

A backbone turns a batch of snippets into feature rows. A run records the two it was trained on (`describe`), and
detection rebuilds exactly those (`build_visual`, `build_audio`).

    name          modality  dim   weights
    light         visual    208   needs none (see encoders/light.py for what it is)
    r3d_18, ...   visual    512 / 768 ...  torchvision's video models: weights="DEFAULT" downloads, or a file on disk
    logmel        audio     128   needs none
    vggish        audio     128   a file on disk
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from counterpoint.errors import CounterpointError, unknown


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


def names(modality: str) -> list[str]:
    """Backbones that can be named for "visual" or "audio"; torchvision's video networks among them."""
    if modality == "audio":
        return ["logmel", "vggish"]
    if modality != "visual":
        raise unknown("modality", modality, ["visual", "audio"])
    from counterpoint.encoders.torchvision_video import available

    return ["light", *available()]


def parse(text: str) -> dict[str, Any]:
    """`name` or `name@weights-file` as the command line has it -> what `build_visual` and `build_audio` take."""
    name, _, weights = text.partition("@")
    return {"name": name, "weights": weights} if weights else {"name": name}


def build_visual(spec: Mapping[str, Any]) -> VisualBackbone:
    """The visual backbone `describe` described: {"name": ..., "weights": ..., "sha256": ...}.

    Raises CounterpointError for an unknown name or an extra that is missing, RunError for weights that cannot be used.
    """
    name = str(spec.get("name"))
    if name == "light":
        from counterpoint.encoders.light import Light

        return Light()
    known = names("visual")
    if name not in known:
        raise unknown("visual backbone", name, known)
    from counterpoint.encoders.torchvision_video import TorchvisionVideo

    return TorchvisionVideo(name, str(spec.get("weights") or "DEFAULT"), spec.get("sha256"))


def build_audio(spec: Mapping[str, Any]) -> AudioBackbone:
    """The audio backbone `describe` described; errors as `build_visual`'s."""
    name = str(spec.get("name"))
    if name not in names("audio"):
        raise unknown("audio backbone", name, names("audio"))
    if name == "logmel":
        from counterpoint.encoders.sound import LogMel

        return LogMel()
    from counterpoint.encoders.sound import VGGish

    if not spec.get("weights"):
        raise CounterpointError("vggish needs its weights: name them as vggish@/path/to/vggish.pth")
    return VGGish(Path(str(spec["weights"])), spec.get("sha256"))
