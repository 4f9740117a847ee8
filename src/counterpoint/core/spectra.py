"""The lowest columns of images' Fourier transforms, and back, part by part.

A part's transforms stay in the processor's cache. Those of a whole batch would need new pages of memory in every call.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

PART = 2**20  # numbers of the images that are transformed at a time


def low_columns(
    images: Float[Tensor, "n channels height width"], reach: int
) -> Complex[Tensor, "n channels height columns"]:
    """Compute the columns fx = 0..reach of the Fourier transform; those of -fx are their conjugates.

    >>> low_columns(torch.ones(1, 1, 2, 2), 0).flatten()
    tensor([4.+0.j, 0.+0.j])
    """
    parts = [torch.fft.fft(torch.fft.rfft(part, dim=3)[..., : reach + 1], dim=2) for part in _parts(images)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def with_columns_added(
    images: Float[Tensor, "n channels height width"], change: Complex[Tensor, "n channels height columns"]
) -> Float[Tensor, "n channels height width"]:
    """Add a change of the columns fx = 0.. of the Fourier transform to images.

    >>> with_columns_added(torch.zeros(1, 1, 2, 2), torch.tensor([[[[4.0 + 0j], [0.0]]]])).flatten()
    tensor([1., 1., 1., 1.])
    """
    parts = _parts(images)
    found = []
    for part, changed in zip(parts, change.split(len(parts[0])), strict=True):
        back = torch.fft.irfft(torch.fft.ifft(changed, dim=2), n=images.shape[3], dim=3)
        found.append(back.add_(part))
    return torch.cat(found) if len(found) > 1 else found[0]


def _parts(images: Tensor) -> tuple[Tensor, ...]:
    return images.split(max(1, PART // images[0].numel()))
