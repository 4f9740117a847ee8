"""Draw what a teacher of pairs does: the captions that it finds hardest, and its size and time beside the student's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.pairs import Modality, rows_with
from counterpoint.data.shown import shown
from counterpoint.encoders.pair_scorers import PairScorer
from counterpoint.engine.survey import Survey
from counterpoint.tasks.pair_scorers import PairLearner, Side

ASKED = 6  # pictures of the gallery


def pair_figures(
    learner: PairLearner, survey: Survey, scorers: Mapping[str, PairScorer], select: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Return the figures of test items; nothing for fewer than two items that have both modalities.

    Args:
        learner: the learner, in evaluation mode.
        survey: access to its data.
        scorers: the scorers to compare, by name; the first is the teacher.
        select: maps the teacher's scores of a picture, its own caption first, to the columns that the student sees.
    """
    (image, text), _ = learner.sides(survey, "test")
    if len(image.states) < 2:
        return {}
    teacher = next(iter(scorers.values())).eval()
    return _hardest(learner, survey, teacher, (image, text), select) | _compared(learner, scorers, (image, text))


def _hardest(
    learner: PairLearner,
    survey: Survey,
    teacher: PairScorer,
    sides: tuple[Side, Side],
    select: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """Show a few pictures, and the captions of the split that the teacher would give the student."""
    (image, text), split = sides, survey.split("test")
    rows = rows_with(split, learner.image, learner.text)[: len(image.states)]
    asked = np.arange(len(rows))[:: max(1, len(rows) // ASKED)][:ASKED]
    scores = learner.all_pairs(teacher, image.rows(torch.from_numpy(asked)), text).cpu()
    parts, wanted = [], set[tuple[str, int]]()
    for at, row in zip(asked, scores, strict=True):
        order = np.concatenate([[at], np.delete(np.arange(len(rows)), at)])
        kept = order[select(row[order][None])[0].numpy()]
        found = [{"item": int(rows[k]), "similarity": round(float(row[k]), 2), "right": bool(k == at)} for k in kept]
        parts.append({"query": int(rows[at]), "found": found})
        wanted |= {(learner.image, int(rows[at])), *((learner.text, int(rows[k])) for k in kept)}
    data: Any = SimpleNamespace(modalities={name: Modality(**spec) for name, spec in learner.facts.modalities.items()})
    items = {f"{name}/{row}": shown(data, split, name, row) for name, row in sorted(wanted)}
    block = {"query": learner.image, "key": learner.text, "rows": parts}
    return {"What the teacher finds hard": {"kind": "gallery", "parts": [block], "items": items}}


def _compared(learner: PairLearner, scorers: Mapping[str, PairScorer], sides: tuple[Side, Side]) -> dict[str, Any]:
    """Compare layers, parameters and time of the scorers."""
    lines = [
        [
            name,
            len(scorer.layers),
            sum(p.numel() for p in scorer.parameters()),
            round(learner.speed(scorer.eval(), *sides), 2),
        ]
        for name, scorer in scorers.items()
    ]
    columns = ["scorer", "layers", "parameters", "ms for 1,000 pairs"]
    caption = "The time is of the scorer alone; both share the encoders."
    return {"Student and teacher": {"kind": "table", "columns": columns, "rows": lines, "caption": caption}}
