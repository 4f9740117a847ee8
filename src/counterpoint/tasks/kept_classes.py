"""Measure and draw whether views of a picture keep the class that a classifier gives the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.data.shown import png


def foreign_classes(labels: Int[Tensor, " n"], base: int, classes: int) -> Bool[Tensor, "n classes"]:
    """Mask the novel classes of base pictures, and the base classes of novel pictures.

    Args:
        labels: class numbers.
        base: number of base classes, which come first.
        classes: number of all classes.

    >>> foreign_classes(torch.tensor([0, 2]), 1, 3)
    tensor([[False,  True,  True],
            [ True, False, False]])
    """
    return (torch.arange(classes, device=labels.device) < base) == (labels >= base)[:, None]


def kept_shares(
    logits: Float[Tensor, "n views classes"], foreign: Bool[Tensor, "n classes"] | None = None
) -> Float[Tensor, " others"]:
    """Compute, for each view after the first, the share of pictures whose best class is that of the first view.

    Args:
        logits: of the picture and of its views.
        foreign: classes that are left out; default: none.
    """
    found = logits if foreign is None else logits.masked_fill(foreign[:, None], -torch.inf)
    best = found.argmax(2)
    return (best[:, 1:] == best[:, :1]).float().mean(0)


def views_figure(
    views: Sequence[Float[Tensor, "n 3 h w"]],
    logits: Float[Tensor, "n views classes"],
    foreign: Bool[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    names: Sequence[str],
    caption: str,
) -> dict[str, Any]:
    """Return a figure of pictures and their views, with the class that each gets and the softmax's share of it.

    Args:
        views: the pictures, then their views, in 0..1.
        logits: of them.
        foreign: classes that are left out.
        labels: class numbers; a picture that gets another class shows its own too.
        names: of the classes.
        caption: text below the figure.
    """
    share, best = logits.masked_fill(foreign[:, None], -torch.inf).softmax(2).max(2)
    rows = []
    for n, pictures in enumerate(zip(*views, strict=True)):
        texts = [f"{names[int(best[n, v])]} {float(share[n, v]):.2f}" for v in range(len(views))]
        if best[n, 0] != labels[n]:
            texts[0] += f", is {names[int(labels[n])]}"
        drawn = [
            (x.permute(1, 2, 0).cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8).repeat(3, 0).repeat(3, 1)
            for x in pictures
        ]
        rows.append({"cells": [{"png": png(a), "text": text} for a, text in zip(drawn, texts, strict=True)]})
    return {"kind": "captioned", "rows": rows, "caption": caption}
