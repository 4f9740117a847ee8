"""Draw training images and what becomes of them, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from counterpoint.data.shown import png
from counterpoint.engine.survey import Survey


def some_images(survey: Survey, count: int) -> UInt8[Tensor, "n 3 h w"]:
    """Return at most `count` training images, evenly spaced."""
    split = survey.split()
    rows = np.arange(len(split))[:: max(1, len(split) // count)][:count]
    return torch.from_numpy(split.images(rows)).permute(0, 3, 1, 2)


def columns_figure(columns: Mapping[str, Float[Tensor, "n 3 _ _"]], caption: str) -> dict[str, Any]:
    """Draw a row for each image, and a column for each of its versions.

    Args:
        columns: the versions of all images in 0..1, by name; values beyond are clipped.
        caption: sentence below the figure.
    """
    pixels = [(x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy() for x in columns.values()]
    rows = [[png(picture, least=48) for picture in row] for row in zip(*pixels, strict=True)]
    return {"kind": "pictures", "columns": list(columns), "rows": rows, "caption": caption}
