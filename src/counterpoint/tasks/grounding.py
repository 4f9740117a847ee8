"""What a run's page shows of a model that finds words in pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.shown import png
from counterpoint.engine.survey import Survey

DRAWN = 4  # pairs that are drawn, at most


def maps_of_words(
    survey: Survey, image: str, text: str, ground: Callable[[Tensor, str], tuple[list[str], Tensor]]
) -> list[dict[str, Any]]:
    """Draw test pictures with a map for each word of their texts: rows of a figure of the kind "maps".

    Args:
        survey: where the pairs come from; they are spread evenly over the test split, and have both sides.
        image, text: names of the two modalities.
        ground: (image [1, 3, size, size] of uint8, its text) -> the words, and their maps [words, rows, columns].
    """
    split, rows = survey.split("test"), []
    at = np.linspace(0, len(split) - 1, min(len(split), 4 * DRAWN)).astype(np.int64)
    texts = [str(words) for words in split.column(text, at)]
    shown = split.present(image, at) & np.array([bool(words.strip()) for words in texts])
    shown &= split.present(text, at)
    for n in np.flatnonzero(shown)[:DRAWN]:
        pixels = np.asarray(split.column(image, at[n : n + 1]))
        words, maps = ground(torch.from_numpy(pixels).permute(0, 3, 1, 2), texts[n])
        drawn = [
            {"text": word, "map": [[round(float(x), 6) for x in line] for line in found]}
            for word, found in zip(words, maps, strict=True)
        ]
        rows.append({"png": png(pixels[0]), "maps": drawn})
    return rows
