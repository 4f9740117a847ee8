"""Build frozen feature backbones for video snippets by name. Importing this package does not import torch.

A backbone turns a batch of snippets into feature rows. A run records the two backbones it was trained on (`describe`).
Detection rebuilds exactly those two (`build_visual`, `build_audio`).

    name          modality  dim   weights
    light         visual    208   needs none (encoders/light.py describes it)
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
    """Map frames to features. Callers pass frames of `frame_size`, (width, height) in pixels."""

    name: str
    dim: int
    frames_per_snippet: int
    frame_size: tuple[int, int]

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map frames [N, frames_per_snippet, H, W, 3], uint8 RGB, to features [N, dim]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the arguments from which `build_visual` rebuilds this backbone: name, weights file and its SHA-256."""
        ...


class AudioBackbone(Protocol):
    """Map sound to features.

    `window_seconds` is the length of sound per snippet, in seconds. The window ends with the snippet.
    """

    name: str
    dim: int
    sample_rate: int
    window_seconds: float

    def __call__(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map mono sound [N, round(window_seconds * sample_rate)] in [-1, 1] to features [N, dim]."""
        ...

    def describe(self) -> dict[str, Any]: ...


def names(modality: str) -> list[str]:
    """List the names of backbones for `modality`, "visual" or "audio"; "visual" includes torchvision's video networks.

    Raises CounterpointError for another modality.
    """
    if modality == "audio":
        return ["logmel", "vggish"]
    if modality != "visual":
        raise unknown("modality", modality, ["visual", "audio"])
    from counterpoint.encoders.torchvision_video import available

    return ["light", *available()]


def parse(text: str) -> dict[str, Any]:
    """Parse `name` or `name@weights-file` of the command line into the `spec` of `build_visual` and `build_audio`."""
    name, _, weights = text.partition("@")
    return {"name": name, "weights": weights} if weights else {"name": name}


def build_visual(spec: Mapping[str, Any]) -> VisualBackbone:
    """Build the visual backbone that `describe` recorded: {"name": ..., "weights": ..., "sha256": ...}.

    Raises CounterpointError for an unknown name or a missing extra, RunError for unusable weights.
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
    """Build the audio backbone that `describe` recorded. Raises the same errors as `build_visual`."""
    name = str(spec.get("name"))
    if name not in names("audio"):
        raise unknown("audio backbone", name, names("audio"))
    if name == "logmel":
        from counterpoint.encoders.sound import LogMel

        return LogMel()
    from counterpoint.encoders.sound import VGGish

    if not spec.get("weights"):
        raise CounterpointError("vggish needs its weights; write vggish@/path/to/vggish.pth")
    return VGGish(Path(str(spec["weights"])), spec.get("sha256"))
