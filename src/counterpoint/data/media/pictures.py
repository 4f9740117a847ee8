"""Convert decoded frames to the form that players display: rotated, mirrored, with square pixels."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# A larger ratio of a pixel's sides comes from a damaged header.
_LONGEST_PIXEL = 20


class Orientation(NamedTuple):
    """The conversion of a stored picture to the displayed one: swap rows and columns first, then flip."""

    swap: bool
    flip_x: bool
    flip_y: bool

    @property
    def mirrored(self) -> bool:
        """Whether the displayed picture is a mirror image of the stored one."""
        return self.swap ^ self.flip_x ^ self.flip_y

    @property
    def rotation(self) -> int:
        """Degrees counter-clockwise: 0, 90, 180 or 270; of a mirrored picture, after mirroring it left to right."""
        flip_x = self.flip_x ^ self.mirrored
        if self.swap:
            return 90 if self.flip_y ^ self.mirrored else 270
        return 180 if flip_x and self.flip_y else 0


UPRIGHT = Orientation(False, False, False)


def orientation(frame: Any) -> Orientation:
    """Read the display matrix of a frame. Angles are rounded to multiples of 90 degrees."""
    found = frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return UPRIGHT
    raw = bytes(found)
    if len(raw) < 36:
        return UPRIGHT
    # A stored point (p, q) is displayed at (a p + c q, b p + d q).
    a, b, _, c, d = struct.unpack("=9i", raw[:36])[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


def sides(stream: Any, frame: Any) -> tuple[int, int]:
    """Return the width and height of a frame with square pixels, before rotation."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    if not 1 / _LONGEST_PIXEL <= aspect <= _LONGEST_PIXEL:
        aspect = Fraction(1)
    return max(1, round(frame.width * aspect)), int(frame.height)


def shown_size(frame: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the displayed width and height of a frame whose stored `sides` are `size`."""
    return size[::-1] if orientation(frame).swap else size


def pixels(frame: Any, size: tuple[int, int], reformatter: Any) -> NDArray[np.uint8]:
    """Convert a frame to RGB [height, width, 3] as displayed, scaled (not cropped) to `size` = (width, height)."""
    turned = orientation(frame)
    width, height = size[::-1] if turned.swap else size
    scaled = reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="AREA")
    out: NDArray[np.uint8] = scaled.to_ndarray()
    if turned == UPRIGHT:
        return out
    if turned.swap:
        out = out.transpose(1, 0, 2)
    return np.ascontiguousarray(out[:: -1 if turned.flip_y else 1, :: -1 if turned.flip_x else 1])


class Sampler:
    """A sampler of frames that arrive in order of time.

    Args:
        spacing: Seconds from one sample to the next. The first sample is at half of it.
        size: Width and height of the samples, in pixels.
        reformatter: PyAV's reformatter.
    """

    def __init__(self, spacing: float, size: tuple[int, int], reformatter: Any) -> None:
        self.spacing, self.size, self.reformatter = spacing, size, reformatter
        self.next = 0  # number of the next sample
        self.frame: Any = None  # the latest frame; its pixels are converted when first needed
        self.pixels: NDArray[np.uint8] | None = None

    def add(self, frame: Any, time: float) -> Iterator[NDArray[np.uint8]]:
        """Take the next frame, shown from `time` on; yield the samples before it."""
        if self.frame is None:
            self.frame = frame  # samples before the first frame repeat it
        yield from self.until(time)
        self.frame, self.pixels = frame, None

    def until(self, time: float) -> Iterator[NDArray[np.uint8]]:
        """Yield the samples before `time`, which the latest frame covers."""
        while (self.next + 0.5) * self.spacing < time - 1e-9:
            if self.pixels is None:
                self.pixels = pixels(self.frame, self.size, self.reformatter)
            self.next += 1
            yield self.pixels
