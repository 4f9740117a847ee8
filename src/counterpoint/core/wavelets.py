"""Split pictures into the bands of a wavelet transform."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.precision import full_precision


@full_precision
def haar_high_frequency(
    image: Float[Tensor, "b channels height width"],
) -> Float[Tensor, "b bands half_height half_width"]:
    r"""Compute the three detail bands of one level of the Haar transform, [b, 3 channels, height / 2, width / 2].

    A block of 2 x 2 pixels with values p q (first row) and r s (second row) gives

        LH = (p + q - r - s) / 2        HL = (p - q + r - s) / 2        HH = (p - q - r + s) / 2

    Args:
        image: floating point, of any range. An odd height or width is padded by one reflected row or column.

    Returns LH of all channels, then HL, then HH. A constant picture gives zeros. Computed as one strided convolution.
    Raises ValueError for another number of axes, an empty batch, and pictures with a side of one pixel.

    >>> haar_high_frequency(torch.tensor([[[[1.0, 2.0], [3.0, 8.0]]]])).flatten()
    tensor([-4., -3.,  2.])
    """
    if image.ndim != 4 or min(image.shape[2:]) < 2:
        raise ValueError(
            f"image must be [b, channels, height, width] of 2 x 2 pixels and more, got {shapes(image=image)}"
        )
    need_rows(image=image)
    channels, height, width = image.shape[1:]
    if height % 2 or width % 2:
        image = F.pad(image, (0, width % 2, 0, height % 2), mode="reflect")
    signs = image.new_tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).view(3, 1, 1, 2, 2) / 2
    weight = signs * torch.eye(channels, dtype=image.dtype, device=image.device)[None, :, :, None, None]
    return F.conv2d(image, weight.flatten(0, 1), stride=2)
