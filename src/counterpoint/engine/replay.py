"""Replay the step of a batch whose loss was not finite, and find the first NaN or infinity."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint.engine.learner import Learner
from counterpoint.engine.options import Loop
from counterpoint.engine.stepper import Stepper
from counterpoint.engine.survey import Survey, moved
from counterpoint.engine.teachers import teachers_of
from counterpoint.errors import CounterpointError, RunError
from counterpoint.words import counted

MOST = 5  # maximum number of modules, and of parameters, in a report


@dataclass
class Replay:
    """The findings of a replayed turn.

    Attributes:
        stage, epoch, step, turn: Position of the fit; epoch and step count from the beginning of the fit.
        losses: The named losses, where the turn was completed.
        error: The message of the error that ended the turn, or "".
        modules: The first modules, in order of execution, with NaN or infinity in the output but not in the input.
        weights: The first parameters and buffers that hold NaN or infinity.
        statistics: For each tensor of the batch, by name: shape, lowest, highest, mean, share of values that are not finite.
    """

    stage: str
    epoch: int
    step: int
    turn: int
    losses: dict[str, float] = field(default_factory=dict)
    error: str = ""
    modules: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether the replayed turn was completed with finite losses."""
        return not self.error and all(np.isfinite(value) for value in self.losses.values())


@contextlib.contextmanager
def watched(learner: Learner, found: list[str]) -> Iterator[None]:
    """Collect, within the block, the modules with finite input whose output is not finite, in order of execution.

    Args:
        learner: Its modules without children are watched.
        found: Receives "name (class)" of the first `MOST` such modules.
    """

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            said = f"{name} ({type(module).__name__})"
            if len(found) < MOST and said not in found and _bad(output) and not _bad(inputs):
                found.append(said)

        return hook

    leaves = [(name, module) for name, module in learner.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def not_finite(learner: Learner) -> list[str]:
    """Name the first parameters and buffers that hold NaN or infinity."""
    return [name for name, value in learner.state_dict().items() if _bad(value)][:MOST]


def statistics(batch: Any, name: str = "") -> dict[str, dict[str, Any]]:
    """Return the statistics of every tensor of a batch, by dotted name: shape, lowest, highest, mean, share not finite."""
    if isinstance(batch, Tensor):
        values = batch.double()
        finite = values[values.isfinite()]
        found: dict[str, Any] = {"shape": tuple(batch.shape)}
        if finite.numel():
            found |= {"lowest": float(finite.min()), "highest": float(finite.max()), "mean": float(finite.mean())}
        share = 1 - finite.numel() / values.numel() if values.numel() else 0.0
        return {name: found | {"not_finite": share}}
    if isinstance(batch, Mapping):
        parts = [(str(key), part) for key, part in batch.items()]
    elif isinstance(batch, list | tuple):
        parts = [(str(number), part) for number, part in enumerate(batch)]
    else:
        return {}
    return {k: v for key, part in parts for k, v in statistics(part, f"{name}.{key}" if name else key).items()}


def replay(learner: Learner, task: Any, kept: Mapping[str, Any], loop: Loop) -> Replay:
    """Rerun the step of a kept batch on one process, and report where numbers stop being finite.

    Args:
        learner: The run's learner, untrained. It receives the kept weights.
        task: The task on the run's data.
        kept: The result of `read_batch`. A batch of several processes is read from the data again, as a whole.
        loop: The run's options of the loop; its precision and number of parts are used.

    Raises CounterpointError when learner, data and the kept batch do not fit together.
    """
    position = kept["position"]
    if not 0 <= position["stage"] < len(learner.stages()):
        raise RunError(
            f"the kept batch is of stage {position['stage'] + 1}, but the learner has {counted(len(learner.stages()), 'stage')}; "
            "replay it "
            "with the settings of its run"
        )
    survey = learner.survey = Survey(task, learner)
    learner.begin(survey)
    learner.restructure(kept["structure"])
    try:
        learner.load_state_dict(kept["learner"])
    except RuntimeError as error:
        raise RunError(
            "the kept weights do not fit the run's config; restore the run's config.yaml, or train again"
        ) from error
    for place, teacher in teachers_of(learner).items():
        teacher.resume(kept["teachers"][place])
    stepper = Stepper(learner, task, replace(loop, compile=False, ema=0.0))
    stepper.stand_at(position)
    stage = stepper.stages[position["stage"]]
    batch = kept["batch"]
    if kept["processes"] > 1:
        batch = next(iter(stepper.loader))
    found = Replay(stage.name, learner.position.all_epochs, learner.position.all_steps, kept["turn"])
    found.weights = not_finite(learner)
    found.statistics = statistics(batch)
    batch = stepper.prepared(moved(batch, stepper.device))
    found.statistics |= {name: s for name, s in statistics(batch).items() if name not in found.statistics}
    if kept["random"]:
        torch.set_rng_state(kept["random"]["cpu"])
        if "cuda" in kept["random"] and stepper.device.type == "cuda":
            torch.cuda.set_rng_state(kept["random"]["cuda"])
    try:
        with watched(learner, found.modules), stepper.networks():
            losses = stepper.losses(stepper.turns[kept["turn"]], batch)
            found.losses = {name: float(value.detach()) for name, value in losses.items()}
    except (CounterpointError, ValueError, RuntimeError) as error:
        found.error = " ".join(str(error).split())
    finally:
        learner.survey = None
    return found


def _bad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and not bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return any(map(_bad, value.values()))
    return isinstance(value, list | tuple) and any(_bad(part) for part in value)
