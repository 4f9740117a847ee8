"""Describe video snippets with `light`, the built-in visual descriptor. It is not a trained network.

It convolves small frames, and their differences from the previous frame, with fixed random 5 x 5 filters. It rectifies the
responses and keeps the strongest one of each filter over the whole picture. It appends statistics of colour and motion.

Single-layer random filters with max pooling detect small distinct objects fairly well, also on changing backgrounds. Source:
Jarrett et al. 2009, Saxe et al. 2011. They need no download and run at hundreds of times real time. They know nothing of
real footage; for that, use a trained network (`encoders.names("visual")`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

FILTERS = 48
STATISTICS = 16
# Rough mean and spread of each group of features on the arcade clips, so that rows have unit order.
CENTRE = {"appearance": 0.5, "change": 0.45}
SPREAD = {"appearance": 0.25, "change": 0.25}


class Light:
    """A descriptor of 208 numbers for a snippet of 4 frames of 96 x 54 pixels.

    The numbers are the mean and the maximum over the frames of 2 x 48 filters, and 16 statistics.
    """

    name = "light"
    dim = 4 * FILTERS + STATISTICS
    frames_per_snippet = 4
    frame_size = (96, 54)

    def __init__(self) -> None:
        # numpy's legacy generator gives the same stream on every platform and version.
        draw = np.random.RandomState(63)
        filters = draw.standard_normal((2 * FILTERS, 3, 5, 5))
        # Half respond to contrast only (zero mean), half also to plain colour; all have unit length.
        filters[::2] -= filters[::2].mean(axis=(2, 3), keepdims=True)
        filters /= np.sqrt((filters**2).sum(axis=(1, 2, 3), keepdims=True))
        self.filters = torch.from_numpy(filters.astype(np.float32))

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map frames [N, 4, H, W, 3], uint8 RGB, to features [N, 208], float32."""
        n, f = frames.shape[:2]
        rgb = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 1, 4, 2, 3).float().div_(127.5).sub_(1.0)
        # Brightness and two colour-opponent channels.
        r, g, b = rgb.unbind(2)
        x = torch.stack([(r + g + b) / 3, (r - g) / 2, (b - (r + g) / 2) / 2], dim=2)
        change = torch.cat([x[:, :1] - x[:, 1:2], x[:, 1:] - x[:, :-1]], dim=1)

        def respond(images: Tensor, filters: Tensor, group: str) -> Tensor:
            peak = F.conv2d(images.flatten(0, 1), filters, stride=2).relu_().amax((2, 3)).view(n, f, -1)
            return (torch.cat([peak.mean(1), peak.amax(1)], dim=1) - CENTRE[group]) / SPREAD[group]

        energy = change.abs()
        coarse = F.avg_pool2d(energy.mean(2), 9)  # [N, F, 6, 10]: where it moves
        statistics = torch.cat(
            [
                x.mean((1, 3, 4)),
                x.std((3, 4)).mean(1),
                x.amax((3, 4)).amax(1),
                x.amin((3, 4)).amin(1),
                10 * energy.mean((1, 2, 3, 4))[:, None],
                4 * coarse.amax((2, 3)).amax(1, keepdim=True),
                4 * coarse.amax((2, 3)).mean(1, keepdim=True),
                10 * coarse.std((2, 3)).mean(1, keepdim=True),
            ],
            dim=1,
        )
        return torch.cat(
            [
                respond(x, self.filters[:FILTERS], "appearance"),
                respond(change, self.filters[FILTERS:], "change"),
                statistics,
            ],
            dim=1,
        ).numpy()
