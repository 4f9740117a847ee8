"""Keep a batch whose loss was not finite, with the weights and the position of the step (see `replay.py`).

The loss is checked before the backward pass. The kept parameters and random state are therefore those from before the step.
Buffers that a loss writes to, such as queues, may hold the batch already.
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
        run: The run directory; the file is bad-batch.ckpt. Only the first process writes it.
        learner: The learner after the turn's loss was computed, before its backward pass.
        batch: The batch of this process.
        turn: Number of the turn within the step, from 0.
        state: State of random numbers before that turn, where it is not the first.

    Returns the path of the file, or None in the other processes.
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
    """Read the file that `keep_batch` wrote. RunError when it is missing, damaged or incomplete."""
    path = run.path / BAD_BATCH
    if not path.is_file():
        raise RunError(f"{run.path} keeps no batch, so there is nothing to replay: all its losses were finite")
    try:
        kept = dict(torch.load(path, map_location="cpu", weights_only=True))
        missing = {"batch", "learner", "structure", "teachers", "position", "turn", "random", "processes"} - set(kept)
    except Exception as error:  # of any kind: the message must name the file
        raise RunError(f"{path} cannot be read ({type(error).__name__}); delete it and train again") from error
    if missing:
        raise RunError(f"{path} lacks {', '.join(sorted(missing))}; delete it and train again")
    return kept
