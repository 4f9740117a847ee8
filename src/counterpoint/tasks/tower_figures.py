"""Draw pairs of towers: the units that a cut left, and what student and teacher make of the same pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.operands import unit
from counterpoint.data.pairs import rows_with
from counterpoint.encoders.towers import Tower
from counterpoint.engine.survey import Survey
from counterpoint.tasks.tower_pairs import TowerLearner

PAIRS = 12  # test items of the matrices


def units_left(towers: Mapping[str, Tower], budget: float) -> dict[str, Any]:
    """Return a table of the units of each block that the cuts left.

    Args:
        towers: both towers by name.
        budget: share of the blocks' parameters that the last cut should leave.
    """
    rows, shapes = [], [tower.shape for tower in towers.values()]
    share = sum(shape.left for shape in shapes) / sum(shape.prunable for shape in shapes)
    caption = (
        f"Units of each block that the masks kept: {share:.0%} of the blocks' parameters; the budget is {budget:.0%}."
    )
    if share > budget + 0.02:
        caption += " The masks did not reach it: raise --mask-epochs or --mask-lr, or lower --sparsity-steps."
    for name, tower in towers.items():
        shape = tower.shape
        for layer, (heads, neurons) in enumerate(zip(shape.kept[1], shape.kept[2], strict=True)):
            left = (len(shape.kept[0]), shape.width), (len(heads), shape.heads), (len(neurons), shape.neurons)
            rows.append([name, layer + 1, *(f"{some} of {whole}" for some, whole in left)])
    return {
        "What the cut left": {
            "kind": "table",
            "columns": ["tower", "block", "channels", "heads", "neurons"],
            "rows": rows,
            "caption": caption,
        }
    }


@torch.no_grad()
def affinity_matrices(learner: TowerLearner, survey: Survey, scale: float) -> dict[str, Any]:
    """Return matrices of the affinities of student and teacher between a few test pictures and their texts.

    Args:
        learner: the student, in evaluation mode, during a fit.
        survey: access to its data.
        scale: factor of the student's cosines.

    Nothing is returned for fewer than two items that have both modalities.
    """
    split, image, text = survey.split("test"), learner.image, learner.text
    rows = rows_with(split, image, text)[:PAIRS]
    if len(rows) < 2 or learner.teacher is None:
        return {}
    batch, texts = survey.batch("test", rows), [str(words) for words in split.column(text, rows)]
    ours, words = learner.embed(batch), learner.network.texts(texts, cut=True)
    found = {
        "student": _matrix(ours[image], ours[text], scale, texts),
        "teacher": _matrix(unit(learner.teacher(batch["inputs"][image])), unit(words), learner.taught_scale, texts),
    }
    return {f"Affinities of the {name}": matrix for name, matrix in found.items()}


def _matrix(u: Float[Tensor, "n dim"], v: Float[Tensor, "n dim"], scale: float, texts: list[str]) -> dict[str, Any]:
    return {
        "kind": "matrix",
        "values": np.round((scale * u @ v.T).softmax(1).cpu().numpy(), 3).tolist(),
        "names": [f"{n + 1} " + " ".join(text.split()[-2:]) for n, text in enumerate(texts)],
        "caption": "Each row: a test picture, named by the end of its caption, and its softmax over the captions.",
    }
