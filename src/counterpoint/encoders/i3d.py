"""The I3D network of pictures (Carreira and Zisserman, arXiv 1705.07750), as XD-Violence's features were made with.

Parameters have the names of the usual PyTorch port (`Mixed_3b.b0.conv3d.weight`), so its checkpoints load. Every convolution and
pooling is padded as TensorFlow's "same": more at the end where the padding is odd.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.weights import read_weights
from counterpoint.encoders.on_device import beside
from counterpoint.errors import RunError
from counterpoint.files import fingerprint

# Widths of the branches of each Inception block: 1x1; 1x1 before 3x3x3, twice; 1x1 after the pooling.
BLOCKS: dict[str, tuple[int, int, int, int, int, int]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLS = {  # before the block: kernel and stride
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pad with zeros so that an output has ceil(size / stride) entries."""
    pads: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - (size % s or s), 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads)


def _pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)


class Unit(nn.Module):
    """A convolution, batch normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(inputs, outputs, self.kernel, self.stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_same(x, self.kernel, self.stride))))


class Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.b0 = Unit(inputs, widths[0])
        self.b1a, self.b1b = Unit(inputs, widths[1]), Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = Unit(inputs, widths[3]), Unit(widths[3], widths[4], 3)
        self.b3b = Unit(inputs, widths[5])

    def forward(self, x: Tensor) -> Tensor:
        pooled = _pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3DNet(nn.Module):
    """I3D without its classifier: [batch, 3, frames, height, width] in [-1, 1] -> [batch, 1024], averaged over time and place."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        width = 192
        for name, widths in BLOCKS.items():
            self.add_module(name, Inception(width, widths))
            width = widths[0] + widths[2] + widths[4] + widths[5]

    def forward(self, x: Float[Tensor, "batch 3 frames height width"]) -> Float[Tensor, "batch 1024"]:
        x = _pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in BLOCKS:
            if name in POOLS:
                x = _pool(x, *POOLS[name])
            x = self.get_submodule(name)(x)
        return x.mean((2, 3, 4))


class I3D:
    """I3D on 16 frames of 224 x 224 pixels per snippet: 1,024 numbers.

    Args:
        weights: a file with the state dict of the usual PyTorch port; its classifier is ignored.
        sha256: hash that the file must have; None: any.
    """

    name = "i3d"
    dim = 1024
    frames_per_snippet = 16
    frame_size = (224, 224)

    def __init__(self, weights: Path, sha256: str | None = None) -> None:
        self.weights = weights
        self.sha256 = fingerprint(weights, sha256)
        self.model = I3DNet()
        state = {k.removeprefix("module."): v for k, v in read_weights(weights).items()}
        state = {k: v for k, v in state.items() if not k.startswith("logits.")}
        own = set(self.model.state_dict())
        if set(state) != own:
            odd = sorted(own.symmetric_difference(state))[:4]
            raise RunError(f"{weights} does not hold I3D's weights; differs in {', '.join(odd)}")
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise RunError(f"{weights} does not fit I3D: {' '.join(str(error).split())[:300]}") from error
        self.model.eval()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "weights": str(self.weights), "sha256": self.sha256}

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map frames [N, 16, H, W, 3], uint8 RGB, to features [N, 1024], float32."""
        found: Tensor = self.model(beside(self.model, frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
        return found.cpu().numpy()
