"""Draw the visual words of a vocabulary by the patches of pictures that they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.codes import inner
from counterpoint.data.shown import png
from counterpoint.encoders.taps import recorded
from counterpoint.engine.survey import Survey

WORDS, PATCHES, PICTURES = 8, 7, 96
LEAST = 24  # pixels of a patch as shown


def word_gallery(
    survey: Survey,
    encoder: nn.Module,
    level: str,
    words: Float[Tensor, "words channels"],
    sharpness: float,
    border: int = 0,
    split: str = "valid",
) -> dict[str, Any]:
    """Return a gallery of words, each with the patches of different pictures whose codes hold most of it.

    Args:
        survey: access to the pictures.
        encoder: network of the feature maps.
        level: name of the layer whose maps the words come from.
        words: the vocabulary, on the CPU.
        sharpness: factor of squared distances in the soft codes, >= 0.
        border: locations left out at each side of a map.
        split: the split whose pictures are shown.
    """

    def maps(batch: dict[str, Any]) -> Tensor:
        with recorded(encoder, [level]) as seen:
            encoder(batch["image"])
        return inner(seen[level], border)

    pictures = survey.split(split)
    rows = np.arange(len(pictures))[:: max(1, len(pictures) // PICTURES)][:PICTURES]
    seen = survey.over(split, maps, rows).float()
    high, wide = seen.shape[2:]
    places = seen.flatten(2).transpose(1, 2)
    codes = torch.stack([(-sharpness * torch.cdist(one, words).square()).softmax(1) for one in places])
    best, at = codes.max(1)  # [pictures, words]
    # Show words that stand for a part of some pictures: not of one alone, and not of all, as the background does.
    special = best.topk(min(PATCHES, len(best)), dim=0).values.mean(0) - best.median(0).values
    used = special.topk(min(WORDS, len(words))).indices
    pixels = pictures.images(rows)
    size = pixels.shape[1]
    side = min(size, max(size // 3, round(3 * size / (high + 2 * border))))
    items: dict[str, Any] = {}
    listed = []
    for word in used.tolist():
        items[f"word/{word}"] = {"text": f"word {word}"}
        found = []
        for picture in best[:, word].topk(min(PATCHES, len(best))).indices.tolist():
            row, column = divmod(int(at[picture, word]), wide)
            corner = [
                min(max(0, round((place + border + 0.5) * size / (extent + 2 * border) - side / 2)), size - side)
                for place, extent in ((row, high), (column, wide))
            ]
            patch = pixels[picture, corner[0] : corner[0] + side, corner[1] : corner[1] + side]
            name = f"{picture}-{word}"
            items[f"patch/{name}"] = {"png": png(patch, least=2 * LEAST)}
            found.append({"item": name, "similarity": float(best[picture, word]), "right": False})
        listed.append({"query": word, "found": found})
    return {
        "Visual words, by the patches with the largest codes": {
            "kind": "gallery",
            "parts": [{"query": "word", "key": "patch", "rows": listed}],
            "items": items,
        }
    }
