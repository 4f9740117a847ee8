"""Convert pictures that are objects in memory: Pillow images, arrays, torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from counterpoint.data.images import Pixels
from counterpoint.errors import DataError

KIND = "an image is uint8 [H, W, 3] or [H, W]"


def is_tensor(value: Any) -> bool:
    """Return whether a value is a torch tensor, without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def is_image(value: Any) -> bool:
    """Return whether a value is a Pillow image."""
    return isinstance(value, Image.Image)


def as_picture(value: Any) -> Image.Image:
    """Return a picture as a Pillow image.

    Args:
        value: A Pillow image. Or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], uint8. Or a torch tensor [H, W] or
            [C, H, W], uint8, or float in 0..1 as torchvision's ToTensor makes it.

    Raises DataError for any other type or shape, and for a tensor with values outside 0..1.
    """
    return value if isinstance(value, Image.Image) else Image.fromarray(as_pixels(value))


def as_pixels(value: Any) -> Pixels:
    """Return an array or tensor as uint8 [H, W], [H, W, 3] or [H, W, 4] (see `as_picture`)."""
    if is_tensor(value):
        found = value.detach().cpu().numpy()
        if found.ndim == 3:
            found = np.moveaxis(found, 0, -1)
        if found.dtype.kind == "f":
            if not np.isfinite(found).all() or found.min(initial=0) < 0 or found.max(initial=0) > 1:
                raise DataError(
                    f"a float tensor must be a picture with values in 0..1, got {found.min():g}..{found.max():g}; remove "
                    "Normalize from its transforms, because Counterpoint normalises pictures itself"
                )
            found = np.rint(found * 255).astype(np.uint8)
    else:
        found = np.asarray(value)
    if found.ndim == 3 and found.shape[2] == 1:
        found = found[..., 0]
    if found.dtype != np.uint8 or not (found.ndim == 2 or (found.ndim == 3 and found.shape[2] in (3, 4))):
        raise DataError(f"{KIND}, got {found.dtype} {list(found.shape)}")
    return np.ascontiguousarray(found)


def ppm(pixels: Pixels) -> bytes:
    """Return pixels [H, W] or [H, W, 3] as the bytes of a PGM or PPM file: a header, then the pixels unchanged."""
    kind = b"P5" if pixels.ndim == 2 else b"P6"
    return b"%s %d %d 255\n" % (kind, pixels.shape[1], pixels.shape[0]) + pixels.tobytes()
