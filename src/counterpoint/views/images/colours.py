"""Change the values of whole batches of images: scale, greys, brightness, contrast, saturation, hue, solarisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from counterpoint.errors import CounterpointError

Images = Float[Tensor, "batch 3 height width"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as pretrained encoders expect
GREY = (0.2989, 0.587, 0.114)


def zero_to_one(images: Tensor) -> Tensor:
    """Convert uint8 0..255 to float32 0..1. Return floating-point images, which must lie in 0..1, unchanged.

    Raises CounterpointError for other types.
    """
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if not images.is_floating_point():
        raise CounterpointError(f"images must be uint8 or floating point, got {images.dtype}")
    return images


def normalise(
    images: UInt8[Tensor, "batch 3 height width"] | Images,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Images:
    """Normalise images for an encoder: (x - mean) / std of x in [0, 1], channel by channel.

    Args:
        images: uint8 0..255 or floating point in [0, 1].
        mean, std: of each channel; by default those of ImageNet.
    """
    x = zero_to_one(images)
    scale = torch.tensor(std, dtype=x.dtype, device=x.device).view(3, 1, 1)
    shift = torch.tensor(mean, dtype=x.dtype, device=x.device).view(3, 1, 1)
    return (x - shift) / scale


def denormalise(images: Images) -> Images:
    """Invert `normalise` with its default mean and deviation, and clamp to [0, 1].

    Args:
        images: floating point, normalised.
    """
    mean, std = (torch.tensor(part, device=images.device).view(3, 1, 1) for part in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)


def per_image(value: Float[Tensor, " batch"]) -> Tensor:
    return value[:, None, None, None]


def grey(images: Images) -> Float[Tensor, "batch 1 height width"]:
    """Compute ITU-R 601 luma: 0.2989 R + 0.587 G + 0.114 B."""
    r, g, b = images.unbind(1)
    return (r * GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2]).unsqueeze(1)


def adjust_brightness(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Scale the values: clamp(factor x, 0, 1)."""
    return (images * per_image(factor)).clamp_(0, 1)


def adjust_contrast(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend with the image's mean grey m: clamp(factor x + (1 - factor) m, 0, 1)."""
    mean = grey(images).mean((1, 2, 3))
    return (images * per_image(factor)).add_(per_image((1 - factor) * mean)).clamp_(0, 1)


def adjust_saturation(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend with each pixel's grey y: clamp(factor x + (1 - factor) y, 0, 1)."""
    return (images * per_image(factor)).add_(grey(images).mul_(per_image(1 - factor))).clamp_(0, 1)


def adjust_hue(images: Images, shift: Float[Tensor, " batch"]) -> Images:
    """Turn the hue of every pixel by `shift` of the colour circle, in [-0.5, 0.5]. Keep value and saturation."""
    r, g, b = images.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    safe = torch.where(chroma == 0, 1.0, chroma)
    # Hue in sixths of the circle, from the largest channel and the difference of the other two.
    of_r = (g - b).div_(safe)
    of_g = (b - r).div_(safe).add_(2)
    of_b = (r - g).div_(safe).add_(4)
    hue = torch.where(value == r, of_r, torch.where(value == g, of_g, of_b))
    turn = hue.div_(6).add_(shift[:, None, None])  # in turns of the circle, not wrapped
    out = torch.empty_like(images)
    for channel, centre in enumerate((1 / 2, 5 / 6, 1 / 6)):
        # The hexcone in one formula: a channel is v - c clamp(2 - 6 d, 0, 1), d in turns from the hue opposite to it.
        away = turn - centre
        share = away.sub_(away.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
        torch.addcmul(value, share, chroma, value=-1, out=out[:, channel])
    return out


def colour_jitter(
    images: Images,
    brightness: Float[Tensor, " batch"],
    contrast: Float[Tensor, " batch"],
    saturation: Float[Tensor, " batch"],
    hue: Float[Tensor, " batch"],
    order: Sequence[int] = (0, 1, 2, 3),
) -> Images:
    """Apply the four colour operations in this order, with factors per image.

    Args:
        images: floating point in [0, 1].
        brightness, contrast, saturation: factors, 1 for no change.
        hue: shift in [-0.5, 0.5] of the colour circle, 0 for no change.
        order: operations to apply: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    """
    steps = (
        (adjust_brightness, brightness),
        (adjust_contrast, contrast),
        (adjust_saturation, saturation),
        (adjust_hue, hue),
    )
    for step in order:
        operation, amount = steps[step]
        images = operation(images, amount)
    return images


def solarise(images: Images, threshold: float = 0.5) -> Images:
    """Invert values at or above the threshold, by default 0.5."""
    return torch.where(images >= threshold, 1 - images, images)
