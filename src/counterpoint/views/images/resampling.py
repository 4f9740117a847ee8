"""Blur, crop and scale whole batches of images, and draw the boxes of crops.

A crop is one `grid_sample`. A blur is two small matrix products per image (rows, then columns).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.errors import CounterpointError
from counterpoint.views.images.colours import Images


def gaussian_blur(images: Images, sigma: Float[Tensor, " batch"], kernel: int) -> Images:
    """Blur each image with a Gaussian; pixels are mirrored at the edges.

    Args:
        images: floating point.
        sigma: standard deviation for each image, in pixels, positive.
        kernel: number of taps of the window, odd and below twice the shorter side.

    Raises CounterpointError for an even kernel and for one that is too large.
    """
    height, width = images.shape[-2:]
    if kernel % 2 == 0 or kernel < 1:
        raise CounterpointError(f"a blur's kernel must be an odd number of pixels, got {kernel}")
    if kernel // 2 >= min(height, width):
        raise CounterpointError(f"a blur of {kernel} taps needs images larger than {height} x {width}")
    taps = torch.arange(kernel, dtype=images.dtype, device=images.device) - kernel // 2
    weights = torch.softmax(-0.5 * (taps / sigma[:, None]) ** 2, dim=1)
    return _separable(images, _band(weights, height), _band(weights, width))


def blur_across(images: Images, kernels: tuple[int, int], sigmas: tuple[float, float]) -> Images:
    """Blur all images with one Gaussian, whose window and deviation differ down and across; edges are mirrored.

    Args:
        images: floating point.
        kernels: numbers of taps down and across, odd and below twice the side.
        sigmas: standard deviations down and across, in pixels, positive.
    """
    bands = []
    for side, kernel, sigma in zip(images.shape[-2:], kernels, sigmas, strict=True):
        taps = torch.arange(kernel, dtype=images.dtype, device=images.device) - kernel // 2
        bands.append(_band(torch.softmax(-0.5 * (taps / sigma) ** 2, 0)[None], side).expand(len(images), -1, -1))
    return _separable(images, *bands)


def _band(weights: Float[Tensor, "batch taps"], size: int) -> Float[Tensor, "batch size size"]:
    """Build the matrix of each image's blur along one axis."""
    taps = weights.shape[1]
    at = torch.arange(size)[:, None] + torch.arange(taps) - taps // 2
    at = at.abs()
    at = torch.where(at >= size, 2 * (size - 1) - at, at).to(weights.device)
    rows = weights[:, None, :].expand(-1, size, -1)
    return weights.new_zeros(len(weights), size, size).scatter_add_(2, at.expand(len(weights), -1, -1), rows)


def _separable(images: Tensor, rows: Float[Tensor, "batch h H"], columns: Float[Tensor, "batch w W"]) -> Tensor:
    """Compute rows X columns^T for every channel X of every image."""
    batch, channels, height, width = images.shape
    wide = torch.bmm(images.reshape(batch, channels * height, width), columns.transpose(1, 2))
    wide = wide.view(batch, channels, height, -1)
    return torch.matmul(rows[:, None], wide)


def resized_crop(
    images: Images,
    boxes: Int[Tensor, "batch 4"],
    size: int,
    flip: Bool[Tensor, " batch"] | None = None,
    antialias: bool = False,
) -> Float[Tensor, "batch 3 size size"]:
    """Cut a box out of every image and scale it to size x size, bilinearly.

    Args:
        images: floating point.
        boxes: top, left, height, width in whole pixels. A box's part outside the image is black.
        size: height and width of the result in pixels.
        flip: True for images whose left and right are exchanged; None: no image.
        antialias: if a box is larger than `size`, widen the filter as Pillow does; by default off.
    """
    top, left, height, width = boxes.to(images.device).unbind(1)
    if antialias:
        columns = _scaling(left, width, images.shape[3], size, images.dtype)
        if flip is not None:
            columns = torch.where(flip.to(images.device)[:, None, None], columns.flip(1), columns)
        return _separable(images, _scaling(top, height, images.shape[2], size, images.dtype), columns)
    across = _centres(left, width, images.shape[3], size, images.dtype)
    down = _centres(top, height, images.shape[2], size, images.dtype)
    if flip is not None:
        across = torch.where(flip.to(images.device)[:, None], across.flip(1), across)
    shape = (len(images), size, size)
    grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _centres(
    start: Int[Tensor, " batch"], length: Int[Tensor, " batch"], extent: int, size: int, dtype: torch.dtype
) -> Float[Tensor, "batch size"]:
    """Compute the place of each output pixel's centre along one axis of the source, in `grid_sample`'s range -1 to 1."""
    at = (torch.arange(size, device=start.device, dtype=dtype) + 0.5) * (length.to(dtype)[:, None] / size) - 0.5
    # Beyond the outermost centres of the box, repeat its edge pixels.
    at = torch.minimum(at.clamp_(min=0), (length - 1).to(dtype)[:, None]) + start.to(dtype)[:, None]
    return (2 * at + 1) / extent - 1


def _scaling(
    start: Int[Tensor, " batch"], length: Int[Tensor, " batch"], extent: int, size: int, dtype: torch.dtype
) -> Float[Tensor, "batch size extent"]:
    """Build the matrix M of each image's antialiased scaling along one axis: out = M x. Pixel centres are at halves."""
    scale = length.to(dtype)[:, None] / size
    at = (torch.arange(size, device=start.device, dtype=dtype) + 0.5) * scale - 0.5 + start.to(dtype)[:, None]
    pixel = torch.arange(extent, device=start.device)
    weights = (1 - (pixel - at[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]).clamp_(min=0)
    weights = weights * ((pixel >= start[:, None]) & (pixel < (start + length)[:, None]))[:, None, :]
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-12)


def random_boxes(
    batch: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Int[Tensor, "batch 4"]:
    """Draw boxes (top, left, height, width) as torchvision's RandomResizedCrop does, in whole pixels.

    The area and the logarithm of the ratio are uniform. Take the first of ten draws that fits in the image. If none fits,
    take the largest centred box within the ratios.

    Args:
        batch: number of boxes.
        height, width: of the images in pixels.
        scale: range of the box's share of the area, within 0 to 1.
        ratio: range of width over height.
        generator: a generator of the CPU.
    """
    tries = 10
    area = height * width * (scale[0] + (scale[1] - scale[0]) * torch.rand(batch, tries, generator=generator))
    low, high = torch.log(torch.tensor(ratio)).tolist()
    aspect = torch.exp(low + (high - low) * torch.rand(batch, tries, generator=generator))
    w = torch.round(torch.sqrt(area * aspect)).long()
    h = torch.round(torch.sqrt(area / aspect)).long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    fallback_w, fallback_h = width, height
    if width / height < min(ratio):
        fallback_h = max(1, round(width / min(ratio)))
    elif width / height > max(ratio):
        fallback_w = max(1, round(height * max(ratio)))
    any_fits = fits.any(1)
    w = torch.where(any_fits, w.gather(1, first)[:, 0], fallback_w)
    h = torch.where(any_fits, h.gather(1, first)[:, 0], fallback_h)
    place = torch.rand(batch, 2, generator=generator)
    top = torch.where(any_fits, (place[:, 0] * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(any_fits, (place[:, 1] * (width - w + 1)).long(), (width - w) // 2)
    return torch.stack([top.minimum(height - h), left.minimum(width - w), h, w], dim=1)
