"""A batch that could not be learned from is kept, with the weights and the position of the step, and can be replayed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint.core.distributed import world
from counterpoint.engine.learner import Learner
from counterpoint.engine.run import Run
from counterpoint.errors import RunError

KEPT = "bad-batch.ckpt"


def keep_batch(run: Run, learner: Learner, batch: dict[str, Any]) -> Path | None:
    """Write a batch as it came from the data, the learner's weights before the step, and its position.

    Only the first process writes. Returns the file, or None in the others.
    """
    if world()[0] != 0:
        return None
    half = run.path / f".{KEPT}.half"
    plain = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}
    torch.save(
        {
            "batch": plain,
            "learner": learner.state_dict(),
            "structure": learner.structure(),
            "position": learner.position.state(),
            "seed": learner.seed,
            "processes": world()[1],
        },
        half,
    )
    os.replace(half, run.path / KEPT)
    return run.path / KEPT


def read_batch(run: Run) -> dict[str, Any]:
    """Read what `keep_batch` wrote; RunError where there is nothing, or nothing readable."""
    path = run.path / KEPT
    if not path.is_file():
        raise RunError(f"{run.path} keeps no batch: it never met a loss that is not finite")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__})") from error


def first_not_finite(learner: Learner, step: Any) -> tuple[list[str], dict[str, float]]:
    """Run a step and find where numbers stopped being finite.

    Args:
        learner: the network, with the weights of before the step.
        step: a call without arguments that returns named losses.

    Returns the names of the first modules whose output holds NaN or infinity though their input does not, in the order of
    execution (at most 5), and the losses.
    """
    found: list[str] = []
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if len(found) < 5 and _bad(output) and not _bad(inputs):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    for name, module in learner.named_modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(watch(name)))
    try:
        losses = {name: float(value.detach()) for name, value in step().items()}
    finally:
        for handle in handles:
            handle.remove()
    return found, losses


def _bad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and not bool(value.isfinite().all())
    return isinstance(value, list | tuple) and any(_bad(part) for part in value)
