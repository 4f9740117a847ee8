"""Define stages, the sequence of a fit, and turns, the sequence of a step.

A fit executes the learner's `stages()` in order. In each stage it makes `turns()` with optimisers and iterates over the
stage's batches. A step executes the turns in order: losses, gradients, a step of the turn's optimisers. Most learners have
one stage with one turn.
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
        optimizers: Optimisers that step together, after one backward pass.
        schedules: Schedules that step after each epoch; those with `per_step` set step after each step.
        loss: Function from a prepared batch to named scalars. Default: the learner's `loss`.
        minimise: Name of the scalar to minimise.
    """

    optimizers: Sequence[Optimizer]
    schedules: Sequence[LRScheduler] = ()
    loss: Callable[[dict[str, Any]], dict[str, Tensor]] | None = None
    minimise: str = "loss"


@dataclass
class Stage:
    """One part of a fit.

    Attributes:
        name: Name to show beside the progress bar.
        epochs: Number of passes over `batches`, at least 1.
        trains: Modules whose parameters train. Default: all parameters that required a gradient when the fit began.
        turns: Turns of the stage, with optimisers. Default: the learner's `turns()`.
        batches: Batches of an epoch. Default: the task's own batches.
        enter: Called when the stage begins, before its optimisers are made: cluster, take a snapshot, initialise again,
            prune. It may replace modules (see `Learner.structure`). It may replace a teacher, but not add one: a resumed fit
            would lack it. A fit resumed within the stage does not call this again.
        carry: Keep the optimisers and schedules of the stage before, with their state.
        evaluated: Measure the learner on `valid` in this stage.
        learns: False for a stage that trains no parameter, such as a search. Its turns have no optimiser, and their losses
            are only recorded.
    """

    name: str
    epochs: int
    trains: Callable[[], Sequence[nn.Module]] | None = None
    turns: Callable[[], list[Turn]] | None = None
    batches: Callable[[Survey], Batches] | None = None
    enter: Callable[[Survey], None] | None = None
    carry: bool = False
    evaluated: bool = True
    learns: bool = True
