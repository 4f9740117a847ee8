"""Draw the sharpened and softened copies of a picture that a learner contrasts."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.tasks.restored import shown, worst_part
from counterpoint.views.images.sharpness import Samples


def samples_figure(
    samples: Samples,
    high: Float[Tensor, "1 3 H W"],
    low: Float[Tensor, "1 3 h w"],
    scale: int,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Draw the positives and the negatives of a picture, where the enlarged one differs most from it.

    Args:
        samples: makes them.
        high, low: the picture in 0..1, and the small one.
        scale: ratio of their sides.
        generator: source of the random numbers.
    """
    drawn = samples.draw(tuple(high.shape), generator)
    positives, negatives = samples.apply(high, low, drawn)
    part = worst_part((negatives[0] - high).square().mean(1)[0], scale)
    sharper = [f"sharpened, factor {float(factor):.2f}" for factor in drawn.factors[0]] + ["with noise"]
    softer = [f"blurred, deviation {down:.1f} x {across:.1f}" for *_, down, across in drawn.blurs]
    rows = []
    for images, names in ((positives, ["original", *sharper]), (negatives, ["low, enlarged", *softer])):
        cells = [{"png": shown(one[0, :, *part]), "text": text} for one, text in zip(images, names, strict=False)]
        rows.append({"cells": cells})
    caption = (
        "The framed part of the first test picture. First row: its positives. Second row: its negatives. Factors and blurs "
        "are drawn in every step."
    )
    return {"kind": "captioned", "rows": rows, "caption": caption}
