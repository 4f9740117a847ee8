"""Make strong views of tiny pictures."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.views.images.colours import normalise, zero_to_one


class Handled:
    """Strong views of tiny pictures: small rotations, zooms, shifts, changes of brightness and noise."""

    DEGREES, ZOOM, SHIFT, LIGHT, NOISE = 15.0, 0.1, 0.125, 0.2, 0.1

    def draw(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the parameters of `count` pictures: [count, 5] in -1 to 1 and noise [count, 1, size, size].

        The five are rotation, zoom, two shifts and brightness.
        """
        return (
            2 * torch.rand(count, 5, generator=generator) - 1,
            self.NOISE * torch.randn(count, 1, size, size, generator=generator),
        )

    def apply(self, images: Tensor, drawn: tuple[Tensor, Tensor]) -> Tensor:
        amount, noise = (part.to(images.device) for part in drawn)
        angle = math.radians(self.DEGREES) * amount[:, 0]
        zoom = 1 / (1 + self.ZOOM * amount[:, 1])
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        shift = 2 * self.SHIFT * amount[:, 2:4]
        theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        moved = F.grid_sample(zero_to_one(images), grid, align_corners=False)
        return normalise((moved * (1 + self.LIGHT * amount[:, 4])[:, None, None, None] + noise).clamp_(0, 1))
