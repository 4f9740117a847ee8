"""Measure and draw classes that a classifier gives pictures and their views, among the base or among the novel classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.data.images import Indices
from counterpoint.data.shown import png
from counterpoint.engine.survey import Survey

DRAWN = 8  # pictures of `views_figure`
Batch = dict[str, Any]


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


def class_shares(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], base: int) -> Float[Tensor, " classes"]:
    """Compute the share of each class's pictures that get their class, among the base or among the novel classes.

    Args:
        logits: of the pictures.
        labels: class numbers.
        base: number of base classes, which come first.

    A class without pictures has NaN.

    >>> class_shares(torch.tensor([[2.0, 1.0, 9.0, 0.0], [2.0, 1.0, 9.0, 0.0]]), torch.tensor([0, 1]), 2)
    tensor([1., 0., nan, nan])
    """
    classes = logits.shape[1]
    right = logits.masked_fill(foreign_classes(labels, base, classes), -torch.inf).argmax(1) == labels
    return right.float().new_zeros(classes).index_add(0, labels, right.float()) / labels.bincount(minlength=classes)


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


def class_curves(
    logits: Mapping[str, Float[Tensor, "n classes"]], labels: Int[Tensor, " n"], base: int
) -> dict[str, Any]:
    """Return a figure of the `class_shares` of several classifiers, for the classes that have pictures."""
    present, last = labels.unique().tolist(), max(part.shape[1] for part in logits.values())
    series = {
        name: [present, np.round(class_shares(part, labels, base)[present].tolist(), 4).tolist()]
        for name, part in logits.items()
    }
    return {
        "kind": "curves",
        "series": series,
        "xlabel": f"class; novel ones from {base} on" if base < last else "class",
        "caption": "Share of each class's test pictures that get their class, among the base or the novel classes.",
    }


def labelled_rows(survey: Survey, split: str, base: int | None = None) -> tuple[Indices, Int[Tensor, " n"]]:
    """Return the positions of a split's pictures of known class, and their class numbers; with `base` of classes below it."""
    labels = np.asarray(survey.split(split).labels)
    rows = np.flatnonzero((labels >= 0) & (labels < (labels.max(initial=0) + 1 if base is None else base)))
    return rows, torch.from_numpy(labels[rows])


def stabilities(
    survey: Survey, split: str, base: int, classified: Callable[[Batch, int], Float[Tensor, "n views classes"]]
) -> list[float]:
    """Return the `kept_shares` of a split's pictures of known class.

    Args:
        survey: access to the data.
        split: valid or test.
        base: number of base classes.
        classified: function from a batch, and the number of the split's pictures, to the logits of pictures and views.
    """
    rows, labels = labelled_rows(survey, split)
    count = len(survey.split(split))
    logits = survey.over(split, lambda batch: classified(batch, count), rows)
    return kept_shares(logits, foreign_classes(labels, base, logits.shape[2])).tolist()


def views_figure(
    survey: Survey,
    base: int,
    views_of: Callable[[Batch, int], Sequence[Float[Tensor, "n 3 h w"]]],
    classified: Callable[[Batch, int], Float[Tensor, "n views classes"]],
    caption: str,
) -> dict[str, Any]:
    """Return a figure of test pictures and their views, with each one's class and the softmax's share of it.

    Args:
        survey: access to the data.
        base: number of base classes.
        views_of: function from a batch, and the number of the split's pictures, to pictures and views in 0..1.
        classified: the same to their logits.
        caption: text below the figure.

    A picture that gets another class shows its own too.
    """
    rows, labels = labelled_rows(survey, "test")
    chosen = np.linspace(0, len(rows) - 1, min(DRAWN, len(rows))).astype(int)
    batch, count, labels = survey.batch("test", rows[chosen]), len(survey.split("test")), labels[chosen]
    with torch.no_grad():
        views, logits = views_of(batch, count), classified(batch, count).cpu()
    foreign, names = foreign_classes(labels, base, logits.shape[2]), survey.classes
    share, best = logits.masked_fill(foreign[:, None], -torch.inf).softmax(2).max(2)
    drawn = []
    for n, pictures in enumerate(zip(*views, strict=True)):
        texts = [f"{names[int(best[n, v])]} {float(share[n, v]):.2f}" for v in range(len(views))]
        if best[n, 0] != labels[n]:
            texts[0] += f", is {names[int(labels[n])]}"
        arrays = [
            (x.permute(1, 2, 0).cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8).repeat(3, 0).repeat(3, 1)
            for x in pictures
        ]
        drawn.append({"cells": [{"png": png(a), "text": text} for a, text in zip(arrays, texts, strict=True)]})
    return {"kind": "captioned", "rows": drawn, "caption": caption}
