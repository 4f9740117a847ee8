"""Draw web pictures for a run's page: a selection by class and confidence, and labels that were corrected or removed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from counterpoint.data.shown import png
from counterpoint.engine.survey import Survey

SHOWN = 6  # pictures in a row
LISTED = 20  # classes in the table


def class_counts(predicted: torch.Tensor, chosen: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the pictures of each predicted class, all and the chosen ones: [classes] each."""
    return predicted.bincount(minlength=classes), predicted[chosen].bincount(minlength=classes)


def selection_figures(learner: Any, survey: Survey) -> dict[str, Any]:
    """Return the figures of the last selection.

    Args:
        learner: has `selected`, `confidence` and `predicted` of all web pictures, and `positions`.
        survey: access to the pictures and the names of the classes.
    """
    chosen, predicted, confidence = learner.selected.cpu(), learner.predicted.cpu(), learner.confidence.cpu()
    names = survey.classes
    before, after = class_counts(predicted, chosen, len(names))
    largest = max(1, int(before.max()))
    order = before.argsort(descending=True)[:LISTED].tolist()
    table = [
        [names[n], int(before[n]), round(float(learner.config.cutoff * b / (2 - b)), 3), int(after[n])]
        for n in order
        for b in [float(before[n]) / largest]
    ]
    rows = []
    for word, mask in (("selected", chosen), ("left out", ~chosen)):
        members = mask.nonzero()[:, 0].numpy()
        if not len(members):
            continue
        some = members[np.linspace(0, len(members) - 1, min(SHOWN, len(members))).astype(np.int64)]
        pictures = survey.split("train").images(learner.positions[some])
        said = [f"{word}: {names[predicted[n]]} {float(confidence[n]):.2f}" for n in some.tolist()]
        rows.append(
            {"cells": [{"png": png(p, least=48), "text": text} for p, text in zip(pictures, said, strict=True)]}
        )
    return {
        "Web pictures of the last epoch": {
            "kind": "captioned",
            "rows": rows,
            "caption": "Pictures that passed the selection of the last epoch, and pictures that did not: predicted class and "
            f"confidence. {int(chosen.sum())} of {len(chosen)} passed." + _by_label(learner, survey, chosen),
        },
        "Predicted classes of web pictures": {
            "kind": "table",
            "columns": ["class", "predicted", "threshold", "selected"],
            "rows": table,
            "caption": "Frequent classes face a threshold near the cutoff, rare ones near 0.",
        },
    }


def _by_label(learner: Any, survey: Survey, chosen: torch.Tensor) -> str:
    """Tell how many pictures with and without a label passed, where the web pictures bring labels; these train nothing."""
    web = getattr(survey.split("train"), "generated", None)
    labels = getattr(web, "labels", None)
    if labels is None or len(labels) != len(chosen):
        return ""
    known = torch.from_numpy(np.asarray(labels) >= 0)
    if bool(known.all()):
        return ""
    said = [f"{int((chosen & part).sum())} of {int(part.sum())}" for part in (known, ~known)]
    return f" Of pictures that show a class {said[0]}, of the others {said[1]}."


def sizes(student: list[nn.Module], teacher: Any) -> dict[str, Any]:
    """Return the table of both networks' parameters; the caption tells if the student is the larger one.

    Args:
        student: the modules that a finished student needs.
        teacher: the teacher's network.
    """
    parts = {"student": student, "teacher": [teacher]}
    counts = {name: sum(p.numel() for part in found for p in part.parameters()) for name, found in parts.items()}
    caption = "Of the student what a finished run needs to classify."
    if counts["student"] > counts["teacher"]:
        caption += " The student is larger than its teacher."
    return {
        "Sizes of both networks": {
            "kind": "table",
            "columns": ["network", "parameters"],
            "rows": [list(row) for row in counts.items()],
            "caption": caption,
        }
    }


def label_figures(
    survey: Survey, labels: torch.Tensor, judged: torch.Tensor, truth: torch.Tensor | None, history: torch.Tensor
) -> dict[str, Any]:
    """Return the curves of judgements over the epochs, and pictures with a corrected or removed label.

    Args:
        survey: access to the pictures and the names of the classes.
        labels, judged, truth: [n] or [n, classes] labels as given, as judged (-1 removed, -2 not judged), and true ones.
        history: [epochs, 4] numbers of labels kept, corrected, removed, and now right; -1 before the main stage.
    """
    at = (history[:, 0] >= 0).nonzero()[:, 0]
    if not len(at):
        return {}
    names = ("kept", "corrected", "removed", *(("kept or corrected, and right",) if truth is not None else ()))
    total = history[at, :3].sum(1).clamp(min=1)
    series = {name: [(at + 1).tolist(), (history[at, n] / total).tolist()] for n, name in enumerate(names)}
    caption = "Share of the training labels by their last judgement, after each epoch of the main stage."
    curves = {"kind": "curves", "series": series, "xlabel": "epoch", "caption": caption}
    classes, rows = survey.classes, []

    def named(label: torch.Tensor, none: str) -> str:
        if not label.ndim:
            return classes[int(label)] if label >= 0 else none
        present = [classes[n] for n in (label == 1).nonzero()[:, 0].tolist()]
        return " + ".join(present) or none

    for chosen in ((judged >= 0) & (judged != labels), judged == -1):
        some = (chosen.flatten(1).any(1) if chosen.ndim == 2 else chosen).nonzero()[:, 0][:SHOWN].numpy()
        cells = []
        for n, picture in zip(some.tolist(), survey.split("train").images(some), strict=True):
            text = f"{named(labels[n], 'none')}: {named(judged[n], 'removed')}"
            if truth is not None:
                text += f"; true: {named(truth[n], 'none')}"
            cells.append({"png": png(picture, least=48), "text": text})
        if cells:
            rows.append({"cells": cells})
    if not rows:
        return {"Labels over the epochs": curves}
    caption = "Web label and judgement; corrected labels first, then removed ones."
    seen = {"kind": "captioned", "rows": rows, "caption": caption}
    return {"Labels over the epochs": curves, "Judged labels": seen}
