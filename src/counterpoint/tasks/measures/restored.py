"""Measure restored pictures as the field does: on the luma Y of 8-bit pictures, without a border.

    psnr(a, b) = 10 log10( 255^2 / mean (Ya - Yb)^2 )
    ssim       the index of Wang et al. 2004: a Gaussian window of 11 pixels, deviation 1.5, K1 = 0.01, K2 = 0.03, range 255,
               the mean over all places of the whole window

Y = 16 + 65.481 r + 128.553 g + 24.966 b of r, g, b in 0..1 (BT.601). Pictures are rounded to 8 bits; Y is not rounded, as in the
field's Python code. torchmetrics has the same PSNR. Its SSIM is also averaged over places where the window leaves the picture, as
the field's is not. A test compares the two where the window fits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike
from counterpoint.core.wavelets import haar_high_frequency

WINDOW, DEVIATION = 11, 1.5
RESTORED = ("psnr", "ssim", "high_frequency_error")


def luma(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Compute Y, 16 to 235, of pictures in 0..1."""
    weight = images.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    return 16 + (images * weight).sum(1, keepdim=True)


def shaved(images: Tensor, border: int) -> Tensor:
    """Cut `border` pixels off every side. Raises ValueError where nothing would be left."""
    height, width = images.shape[-2:]
    if border < 0 or min(height, width) <= 2 * border:
        raise ValueError(f"border must be at least 0 and leave pixels of {height} x {width}, got {border}")
    return images[..., border : height - border, border : width - border]


def psnr(restored: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Compute the peak signal-to-noise ratio of each picture, in dB, of values in 0..255; infinite for equal pictures."""
    need_alike("n c h w", restored=restored, truth=truth)
    return 10 * torch.log10(255**2 / (restored.double() - truth.double()).square().mean((1, 2, 3)))


def ssim(restored: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Compute the structural similarity of each picture, of values in 0..255; 1 for equal pictures.

    Raises ValueError for pictures smaller than the window of 11 pixels.
    """
    need_alike("n c h w", restored=restored, truth=truth)
    if min(restored.shape[2:]) < WINDOW:
        raise ValueError(f"restored must be at least {WINDOW} x {WINDOW} pixels, got {list(restored.shape[2:])}")
    taps = torch.arange(WINDOW, dtype=torch.float64, device=restored.device) - WINDOW // 2
    line = torch.softmax(-0.5 * (taps / DEVIATION) ** 2, 0)
    a, b = restored.double().flatten(0, 1)[:, None], truth.double().flatten(0, 1)[:, None]
    five = torch.cat([a, b, a * a, b * b, a * b], 1)
    kernels = line.expand(5, 1, 1, -1)
    means = F.conv2d(F.conv2d(five, kernels, groups=5), kernels.transpose(2, 3), groups=5)
    mean_a, mean_b, aa, bb, ab = means.unbind(1)
    one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mean_a * mean_b + one) * (2 * (ab - mean_a * mean_b) + two)
    index /= (mean_a**2 + mean_b**2 + one) * (aa - mean_a**2 + bb - mean_b**2 + two)
    return index.mean((1, 2)).view(restored.shape[:2]).mean(1)


def restoration(
    restored: Float[Tensor, "n 3 h w"], truth: Float[Tensor, "n 3 h w"], border: int
) -> dict[str, Float[Tensor, " n"]]:
    """Measure each restored picture against the truth, both in 0..1.

    Args:
        restored: is clamped and rounded to 8 bits first.
        truth: of 8 bits.
        border: number of pixels to leave out at every side, at least 0; the scale, by custom.

    Returns `psnr` in dB and `ssim` of Y, and `high_frequency_error`. This is the mean absolute error of the Haar bands LH, HL
    and HH, in grey levels of 0..255. `ssim` is nan for pictures below 11 pixels.
    """
    pair = [shaved((x.clamp(0, 1) * 255).round(), border) for x in (restored, truth)]
    ours, theirs = (luma(x / 255) for x in pair)
    small = min(ours.shape[2:]) < WINDOW
    bands = (
        haar_high_frequency(pair[0] - pair[1])
        if min(ours.shape[2:]) > 1
        else pair[0].new_full((len(ours), 1), torch.nan)
    )
    return {
        "psnr": psnr(ours, theirs),
        "ssim": ours.new_full((len(ours),), torch.nan) if small else ssim(ours, theirs),
        "high_frequency_error": bands.abs().flatten(1).mean(1),
    }
