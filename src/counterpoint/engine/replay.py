"""Replay of a batch that could not be learned from: the step runs again, and is looked into."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint.engine.fit import Fit
from counterpoint.engine.learner import Learner
from counterpoint.engine.options import Loop
from counterpoint.engine.survey import Survey, moved
from counterpoint.engine.teachers import teachers_of
from counterpoint.errors import CounterpointError, RunError

MOST = 5  # modules and parameters that are named


@dataclass
class Replay:
    """What a replayed turn shows.

    Attributes:
        stage, epoch, step, turn: where the fit stood; epoch and step count from the beginning of the fit.
        losses: the named losses, where the turn came to its end.
        error: the message of the error that it ended with, or "".
        modules: the first modules, in order of execution, whose output holds NaN or infinity though their input does not.
        weights: the first parameters and buffers that hold NaN or infinity.
        statistics: of each tensor of the batch, by name: shape, lowest, highest, mean, share of values that are not finite.
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
        """Whether the replayed turn went well."""
        return not self.error and all(np.isfinite(value) for value in self.losses.values())


@contextlib.contextmanager
def watched(learner: Learner, found: list[str]) -> Iterator[None]:
    """Inside, note modules whose output is not finite though their input is, in order of execution.

    Args:
        learner: whose modules without children are watched.
        found: gets "name (class)" of the first `MOST` of them.
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
    """Describe every tensor of a batch, by dotted name."""
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
    """Run the step of a kept batch again, on one process, and look into it.

    Args:
        learner: of the run, untrained. It gets the kept weights.
        task: on the run's data.
        kept: what `read_batch` returned. A batch of several processes is read from the data again, whole.
        loop: the run's options of the loop; its precision and parts are used.

    Raises CounterpointError where learner, data and the kept batch do not fit.
    """
    position = kept["position"]
    if not 0 <= position["stage"] < len(learner.stages()):
        raise RunError(
            f"the kept batch is of stage {position['stage'] + 1}, the learner has {len(learner.stages())} stages"
        )
    survey = learner.survey = Survey(task, learner)
    learner.begin(survey)
    learner.restructure(kept["structure"])
    try:
        learner.load_state_dict(kept["learner"])
    except RuntimeError as error:
        raise RunError("the kept weights do not fit the run's config") from error
    for place, teacher in teachers_of(learner).items():
        teacher.resume(kept["teachers"][place])
    fit = Fit(learner, task, replace(loop, compile=False, ema=0.0, patience=0, log=()), 1, None, (), None)
    fit.stand_at(position)
    stage = fit.stages[position["stage"]]
    batch = kept["batch"]
    if kept["processes"] > 1:
        batch = next(iter(fit.loader))
    found = Replay(stage.name, learner.position.all_epochs, learner.position.all_steps, kept["turn"])
    found.weights = not_finite(learner)
    found.statistics = statistics(batch)
    batch = fit.prepared(moved(batch, fit.device))
    found.statistics |= {name: s for name, s in statistics(batch).items() if name not in found.statistics}
    if kept["random"]:
        torch.set_rng_state(kept["random"]["cpu"])
        if "cuda" in kept["random"] and fit.device.type == "cuda":
            torch.cuda.set_rng_state(kept["random"]["cuda"])
    try:
        with watched(learner, found.modules), fit.networks():
            losses = fit.losses(fit.turns[kept["turn"]], batch)
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
