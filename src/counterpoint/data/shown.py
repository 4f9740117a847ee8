"""Items for display: pictures and sounds as text that a web page can hold."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from counterpoint.data.pairs import AlignedData, AlignedSplit

LARGEST = 96  # pixels of a picture's longer side
NUMBERS = 6  # of a vector
PALETTE = ("red", "orange", "yellow", "lime", "cyan", "blue", "magenta", "white", "brown", "pink")  # of boxes


def shown(data: AlignedData, split: AlignedSplit, name: str, row: int) -> dict[str, Any]:
    """Return one modality of an item for JSON: {"text"}, {"png"} or {"wav"} (both base64), or {"numbers"}.

    Args:
        data: the set.
        split: one of its splits.
        name: of the modality.
        row: position of the item in the split.
    """
    modality = data.modalities[name]
    value: Any = split.column(name, np.array([row]))[0]
    if modality.kind == "text":
        return {"text": str(value)}
    if modality.kind == "image":
        return {"png": png(value)}
    if modality.kind == "audio":
        assert modality.rate is not None
        return {"wav": wav(value, modality.rate)}
    return {"numbers": [round(float(number), 3) for number in value[:NUMBERS]]}


def png(pixels: NDArray[np.uint8], largest: int = LARGEST, *, least: int = 1) -> str:
    """Encode a picture as a PNG in base64, scaled down where it is large.

    Args:
        pixels: [H, W, 3] or [H, W].
        largest: most pixels of a side; by default 96.
        least: fewest pixels of a side; a smaller picture is enlarged by whole pixels. By default 1.
    """
    larger = -(-least // min(pixels.shape[:2]))
    pixels = pixels.repeat(larger, axis=0).repeat(larger, axis=1)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((largest, largest))
    out = io.BytesIO()
    image.save(out, "PNG")  # `optimize` takes five times as long for 4 % fewer bytes
    return base64.b64encode(out.getvalue()).decode()


def with_boxes(picture: NDArray[np.uint8], corners: NDArray[np.float32], labels: Sequence[int], larger: int = 3) -> str:
    """Draw boxes on a picture in the colours of their classes (PALETTE), and encode it as a PNG in base64.

    Args:
        picture: [H, W, 3].
        corners: [n, 4] left, top, right, bottom in pixels.
        labels: class number of each box.
        larger: whole factor by which the picture is enlarged, by default 3.
    """
    shown = Image.fromarray(picture.repeat(larger, 0).repeat(larger, 1))
    draw = ImageDraw.Draw(shown)
    for box, label in zip(corners, labels, strict=True):
        draw.rectangle([float(edge) * larger for edge in box], outline=PALETTE[label % len(PALETTE)], width=2)
    return png(np.asarray(shown), largest=max(shown.size))


def captioned(cells: Sequence[dict[str, str]], across: int, caption: str) -> dict[str, Any]:
    """Return a figure for a run's page: pictures with a text each, in rows of `across`.

    Args:
        cells: {"png", "text"} of each picture, in order.
        across: number of pictures in a row.
        caption: sentence above the pictures.
    """
    rows = [{"cells": list(cells[start : start + across])} for start in range(0, len(cells), across)]
    return {"kind": "captioned", "rows": rows, "caption": caption}


def wav(sound: NDArray[np.float32], rate: int) -> str:
    """Encode a sound as a WAV of 16 bits in base64, at 12 kHz or less.

    Args:
        sound: [samples], mono in [-1, 1].
        rate: samples per second.
    """
    step = -(-rate // 12000)
    if step > 1:
        from scipy.signal import resample_poly

        sound = resample_poly(sound, 1, step)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate // step)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return base64.b64encode(out.getvalue()).decode()
