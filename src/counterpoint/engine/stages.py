"""Stages and turns: what a fit does one after another, and what a step does one after another.

A fit goes through the learner's `stages()`. In each it makes `turns()` of optimisers and passes over the stage's batches. A
step takes the turns in order: losses, gradients, a step of the turn's optimisers. One stage of one turn is the usual case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from counterpoint.engine.loading import Batches
from counterpoint.engine.survey import Survey


@dataclass
class Turn:
    """One update within a step: a forward pass, a backward pass, a step of its optimisers.

    Attributes:
        optimizers: step together, after one backward pass.
        schedules: stepped after each epoch; those with `per_step` set, after each step.
        loss: named scalars of a prepared batch; default: the learner's `loss`.
        minimise: name of the scalar that is minimised.
    """

    optimizers: Sequence[Optimizer]
    schedules: Sequence[LRScheduler] = ()
    loss: Callable[[dict[str, Any]], dict[str, Tensor]] | None = None
    minimise: str = "loss"


@dataclass
class Stage:
    """One part of a fit.

    Attributes:
        name: shown beside the progress bar.
        epochs: passes over what `batches` gives, at least 1.
        trains: modules whose parameters train; default: all that required a gradient when the fit began.
        turns: optimisers of the stage; default: the learner's `turns()`.
        batches: which examples an epoch sees; default: the task's own batches.
        enter: called when the stage begins, before its optimisers are made: cluster, take a snapshot, start anew, cut. It
            may replace modules (see `Learner.structure`). A teacher has its place from the beginning and is taken anew here, so
            that a resumed fit has it. A fit resumed within the stage does not call this again.
        carry: keep the optimisers and schedules of the stage before, with their state.
        evaluated: measure the learner on `valid` in this stage.
    """

    name: str
    epochs: int
    trains: Callable[[], Sequence[nn.Module]] | None = None
    turns: Callable[[], list[Turn]] | None = None
    batches: Callable[[Survey], Batches] | None = None
    enter: Callable[[Survey], None] | None = None
    carry: bool = False
    evaluated: bool = True
