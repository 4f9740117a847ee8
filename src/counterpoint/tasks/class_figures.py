"""Draw what students of a teacher's class texts learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen
from counterpoint.tasks.measures import axes_figure

DRAWN = 300  # test pictures in the picture of the space


def teacher_space(
    survey: Survey,
    embed: Callable[[Tensor], Tensor],
    teacher: Frozen | None,
    texts: Float[Tensor, "classes dim"],
) -> dict[str, Any]:
    """Draw test pictures of the student and of the teacher beside the classes' texts, on two principal axes.

    Args:
        survey: access to the pictures.
        embed: maps normalised pictures to the student's rows in the teacher's space.
        teacher: maps normalised pictures to its rows; None: unknown, as of a file.
        texts: unit rows of the classes' texts.
    """
    shown = np.arange(min(DRAWN, len(survey.split("test"))))
    rows = {"student": F.normalize(survey.over("test", lambda batch: embed(batch["image"]), shown), dim=1)}
    if teacher is not None:
        rows["teacher"] = F.normalize(survey.over("test", lambda batch: teacher(batch["image"]), shown), dim=1)
    rows["texts"] = texts.cpu()
    return axes_figure(rows, "Test pictures as student and teacher embed them, and the texts of the classes.")
