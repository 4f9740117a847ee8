"""Change a picture of a prompt at random: RITUAL's transformations and STIC's damages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from counterpoint.errors import unknown

Pixels = NDArray[np.uint8]  # [height, width, 3] RGB

Transform = Literal["horizontal", "vertical", "rotation", "colours", "blur", "crop"]
TRANSFORMS = get_args(Transform)
SHORT = 20  # largest side of a picture that is scaled down, in pixels


def transformed(picture: Pixels, name: str, generator: torch.Generator) -> Pixels:
    """Transform a picture [H, W, 3].

    Args:
        picture: RGB pixels.
        name: horizontal or vertical (flips); rotation, by up to 180 degrees, black outside; colours (brightness, contrast and
            saturation times 0..2, hue by up to half a turn); blur (sigma 1.5..2.0, kernel 13); crop, 8 to 100 % of the area, to
            the picture's size; none.
        generator: source of the random numbers.
    """

    def uniform(low: float, high: float) -> float:
        return float(low + (high - low) * torch.rand((), generator=generator))

    x = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    height, width = x.shape[1:]
    if name == "horizontal":
        x = T.horizontal_flip(x)
    elif name == "vertical":
        x = T.vertical_flip(x)
    elif name == "rotation":
        x = T.rotate(x, uniform(-180, 180))
    elif name == "colours":
        changes: list[Callable[[Tensor], Tensor]] = [
            lambda y: T.adjust_brightness(y, uniform(0, 2)),
            lambda y: T.adjust_contrast(y, uniform(0, 2)),
            lambda y: T.adjust_saturation(y, uniform(0, 2)),
            lambda y: T.adjust_hue(y, uniform(-0.5, 0.5)),
        ]
        for n in torch.randperm(len(changes), generator=generator).tolist():
            x = changes[n](x)
    elif name == "blur":
        kernel = min(13, 2 * (min(height, width) // 2) - 1)
        x = T.gaussian_blur(x, [kernel, kernel], [uniform(1.5, 2.0)])
    elif name == "crop":
        area, ratio = uniform(0.08, 1.0) * height * width, math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        tall, wide_ = (
            min(side, max(1, round(math.sqrt(area * r)))) for side, r in ((height, 1 / ratio), (width, ratio))
        )
        top, left = int(uniform(0, height - tall + 1)), int(uniform(0, width - wide_ + 1))
        x = T.resized_crop(x, top, left, tall, wide_, [height, width], antialias=True)
    elif name != "none":
        raise unknown("transformation", name, (*TRANSFORMS, "none"))
    return x.permute(1, 2, 0).contiguous().numpy()


def damaged(picture: Pixels, generator: torch.Generator) -> Pixels:
    """Scale a picture [H, W, 3] to 20 pixels and back, or change its colours, by equal chances."""
    x = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    draws = torch.rand(3, generator=generator).tolist()
    if draws[0] < 0.5:
        small = min(SHORT, max(2, min(x.shape[1:]) // 4))
        x = T.resize(T.resize(x, [small, small], antialias=True), list(x.shape[1:]), antialias=True)
    else:
        x = T.adjust_hue(T.adjust_brightness(x, 0.5 + draws[1]), 0.6 * draws[2] - 0.3)
    return x.permute(1, 2, 0).contiguous().numpy()
