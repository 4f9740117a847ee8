"""Use torchvision's video networks as frozen backbones: remove the classifier, whose input becomes the feature."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.models as tv
from numpy.typing import NDArray
from torch import nn

from counterpoint.core.weights import read_weights
from counterpoint.encoders.on_device import beside
from counterpoint.errors import CounterpointError, RunError
from counterpoint.files import fingerprint

HEADS = ("fc", "head", "classifier")


@cache
def available() -> tuple[str, ...]:
    """List the names of torchvision's video classifiers."""
    return tuple(tv.list_models(module=tv.video))


class TorchvisionVideo:
    """One of torchvision's video classifiers without its head, on 16 frames per snippet.

    The weights come with a transform. Callers scale frames to `frame_size`, the size that the transform asks for. If the
    transform scales only the short side, frames become squares. The transform then crops and normalises them.

    Args:
        name: a name from `available`.
        weights: "DEFAULT" (torchvision downloads them on first use) or a file with the state dict of the whole classifier.
        sha256: hash that the file must have; None: any.
    """

    frames_per_snippet = 16

    def __init__(self, name: str, weights: str = "DEFAULT", sha256: str | None = None) -> None:
        self.name = name
        self.weights = weights
        preset = tv.get_model_weights(name).DEFAULT
        self.transform = preset.transforms()
        size = list(self.transform.resize_size)
        self.frame_size = (size[1], size[0]) if len(size) == 2 else (size[0], size[0])
        self.sha256: str | None = None
        if weights == "DEFAULT":
            try:
                model = tv.get_model(name, weights=preset)
            except OSError as error:
                raise CounterpointError(
                    f"torchvision could not download the weights of {name} ({error}); "
                    f"download them on another machine and name the file: {name}@/path/to/weights.pth"
                ) from error
        else:
            self.sha256 = fingerprint(Path(weights), sha256)
            model = tv.get_model(name, weights=None)
            try:
                model.load_state_dict(read_weights(Path(weights)))
            except RuntimeError as error:
                raise RunError(f"{weights} does not fit {name}: {' '.join(str(error).split())[:300]}") from error
        head = next(h for h in HEADS if hasattr(model, h))
        setattr(model, head, nn.Identity())
        self.model = model.eval()
        width, height = self.frame_size
        self.dim = self(np.zeros((1, self.frames_per_snippet, height, width, 3), np.uint8)).shape[1]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "weights": self.weights, "sha256": self.sha256}

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map frames [N, 16, H, W, 3], uint8 RGB, to features [N, dim], float32."""
        clips = beside(self.model, frames).permute(0, 1, 4, 2, 3)
        return self.model(self.transform(clips)).float().cpu().numpy()
