"""A batch that could not be learned from is kept, with the weights and the position of the step (see `replay.py`).

The loss is checked before the backward pass, so the parameters are those from before the step, and so is the state of random
numbers. Buffers that a loss writes to, such as queues, may hold the batch already.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.core.world import processes
from counterpoint.engine.learner import Learner
from counterpoint.engine.run import BAD_BATCH, Run
from counterpoint.engine.teachers import teachers_of
from counterpoint.errors import RunError


def random_state() -> dict[str, Tensor]:
    """Return the state of torch's global random numbers."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def keep_batch(
    run: Run, learner: Learner, batch: dict[str, Any], turn: int = 0, state: Mapping[str, Tensor] | None = None
) -> Path | None:
    """Write a batch as it came from the data, the learner's weights, and the position of the step.

    Args:
        run: where it is written, as bad-batch.ckpt. Only the first process writes.
        learner: after the turn's loss was taken, before its backward pass.
        batch: of this process.
        turn: number of the turn within the step.
        state: of random numbers before that turn, where it is not the first.

    Returns the file, or None in the other processes.
    """
    if processes()[0] != 0:
        return None
    half = run.path / f".{BAD_BATCH}.half"
    torch.save(
        {
            "batch": _plain(batch),
            "learner": learner.state_dict(),
            "structure": learner.structure(),
            "teachers": {place: teacher.state() for place, teacher in teachers_of(learner).items()},
            "position": learner.position.state(),
            "turn": turn,
            "random": dict(state or {}),
            "processes": processes()[1],
        },
        half,
    )
    os.replace(half, run.path / BAD_BATCH)
    return run.path / BAD_BATCH


def _plain(value: Any) -> Any:
    """Return a batch in types that `torch.load(weights_only=True)` reads."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value) if value.dtype.kind in "biuf" else value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def read_batch(run: Run) -> dict[str, Any]:
    """Read what `keep_batch` wrote; RunError where there is nothing, or nothing readable."""
    path = run.path / BAD_BATCH
    if not path.is_file():
        raise RunError(f"{run.path} keeps no batch: it never met a loss that is not finite")
    try:
        kept = dict(torch.load(path, map_location="cpu", weights_only=True))
        missing = {"batch", "learner", "structure", "teachers", "position", "turn", "random", "processes"} - set(kept)
    except Exception as error:  # any kind: the user must know which file it is
        raise RunError(f"{path} cannot be read ({type(error).__name__}); delete it and train again") from error
    if missing:
        raise RunError(f"{path} lacks {', '.join(sorted(missing))}; delete it and train again")
    return kept
