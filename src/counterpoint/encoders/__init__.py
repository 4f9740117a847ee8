"""Build frozen feature backbones for video snippets by name. Importing this package does not import torch.

A backbone turns a batch of snippets into feature rows. A run records the two backbones it was trained on (`describe`).
Detection rebuilds exactly those two (`build_visual`, `build_audio`).

    name          modality  dim   weights
    light         visual    208   needs none (encoders/light.py describes it)
    r3d_18, ...   visual    512 / 768 ...  torchvision's video models: weights="DEFAULT" downloads, or a file on disk
    i3d           visual    1024  a file on disk
    timm:NAME     visual    the model's  timm's picture models, on 4 frames: downloaded, or a file on disk
    hf:FOLDER     visual    the model's  a video model of transformers: VideoMAE, ViViT, TimeSformer
    logmel        audio     128   needs none
    vggish        audio     128   a file on disk
    hf:FOLDER     audio     the model's  an audio model of transformers: AST, wav2vec 2.0
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
    """List the names of backbones for `modality`, "visual" or "audio", as a user types them.

    Raises CounterpointError for another modality.
    """
    if modality == "audio":
        return ["logmel", "vggish", "hf:FOLDER"]
    if modality != "visual":
        raise unknown("modality", modality, ["visual", "audio"])
    from counterpoint.encoders.torchvision_video import available

    return ["light", "i3d", "timm:NAME", "hf:FOLDER", *available()]


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
    library, colon, model = name.partition(":")
    weights, sha256 = spec.get("weights"), spec.get("sha256")
    if colon and model and library in ("hf", "timm"):
        from counterpoint.encoders.published_video import TimmFrames, TransformersVideo

        return TransformersVideo(model, sha256) if library == "hf" else TimmFrames(model, weights, sha256)
    known = names("visual")
    if name not in known or colon:
        raise unknown("visual backbone", name, known)
    if name == "i3d":
        from counterpoint.encoders.i3d import I3D

        if not weights:
            raise CounterpointError("i3d needs its weights; write i3d@/path/to/rgb_imagenet.pt")
        return I3D(Path(str(weights)), sha256)
    from counterpoint.encoders.torchvision_video import TorchvisionVideo

    return TorchvisionVideo(name, str(weights or "DEFAULT"), sha256)


def build_audio(spec: Mapping[str, Any]) -> AudioBackbone:
    """Build the audio backbone that `describe` recorded. Raises the same errors as `build_visual`."""
    name = str(spec.get("name"))
    if name.startswith("hf:") and name != "hf:":
        from counterpoint.encoders.published_video import TransformersAudio

        return TransformersAudio(name.removeprefix("hf:"), spec.get("sha256"))
    if name not in names("audio") or ":" in name:
        raise unknown("audio backbone", name, names("audio"))
    if name == "logmel":
        from counterpoint.encoders.sound import LogMel

        return LogMel()
    from counterpoint.encoders.sound import VGGish

    if not spec.get("weights"):
        raise CounterpointError("vggish needs its weights; write vggish@/path/to/vggish.pth")
    return VGGish(Path(str(spec["weights"])), spec.get("sha256"))
