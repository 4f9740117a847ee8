"""The base of every trained system: a module that names its losses and what it predicts.

It is a plain torch module, so that a trained system is used without the trainer; `engine.fit` wraps it for Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint.core.distributed import place, world
from counterpoint.engine.loading import Position
from counterpoint.errors import CounterpointError


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) & (2**63 - 1)


class Learner(nn.Module):
    """Subclasses write `loss`, `predict` and `configure_optimizers`; networks, optimisers and hooks are theirs to choose.

    Several optimisers need no loop of their own: each entry of `minimised` names a loss, all are summed, one backward
    pass fills the gradients, and every optimiser steps. For networks that share no parameter this is exactly one
    backward and step after another, and unlike that it is right under DistributedDataParallel.
    """

    minimised: ClassVar[tuple[str, ...]] = ("loss",)
    # Epochs of an earlier stage of training, which `fit` adds to those it is asked for.
    earlier_epochs: int = 0
    # Whether a step's loss may leave parameters out, as stages do: several processes then look for what it reached.
    partial_steps: ClassVar[bool] = False
    # Steps of the whole fit, of which `position.step` are done; `fit` sets it.
    total_steps: int = 0

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.parts = nn.ModuleDict()  # additions over a contrastive learner, by slug (see systems.parts)
        self.position = Position()
        self.evaluator: Any = None
        self.optimizers: list[torch.optim.Optimizer] = []  # there for the time of a fit

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def configure_optimizers(self) -> Any:
        """Optimisers and schedules, in any form that Lightning takes."""
        raise CounterpointError(f"{type(self).__name__} has no optimiser")

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Named scalars; those in `minimised` are minimised, all are recorded."""
        raise CounterpointError(f"{type(self).__name__} has no loss")

    def predict(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the task's evaluator wants of a test batch (see the task)."""
        raise CounterpointError(f"{type(self).__name__} cannot predict")

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """The batch as the loss wants it: views, mixtures, whatever is drawn anew each step. The generator's state depends
        on seed and step alone, not on the process: what is drawn for the whole batch is the same everywhere."""
        return batch

    def share(self, rows: int) -> tuple[int, slice]:
        """How many rows the whole batch has, and which of them are this process's, who has `rows`.

        What is random is drawn for the whole batch and cut to the share, so that W processes see what one would.
        """
        rank, size = world()
        return place(rows, self.device).total if size > 1 else rows, slice(rank, None, size)

    def begin(self, task: Any) -> None:
        """Called before a fit, new or resumed, with the task: what only training needs to know of the data. What is
        resumed from a checkpoint comes after it."""

    def start(self) -> None:
        """Called when a fit starts, after a checkpoint was read and the processes have met."""

    def before_step(self) -> None:
        """Called when the gradients are there, before the optimisers step: parameters whose gradient is None stay as they
        are."""

    def end_step(self) -> None:
        """Called once the optimisers have stepped: moving averages, bounds on parameters."""

    def end_epoch(self, epoch: int) -> None:
        """Called once an epoch's steps and schedulers are done, before it is evaluated."""

    def figures(self, task: Any) -> dict[str, Any]:
        """What the page of a run shows besides numbers and what the task draws: heading -> {"kind": ...}, fit for JSON (see
        counterpoint.report.found). Called once, after the fit, by the first process alone."""
        return {}

    def exported(self) -> dict[str, Tensor]:
        """What a run keeps as model.safetensors: by default everything."""
        return dict(self.state_dict())

    def step(self, batch: dict[str, Any], backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """One step on a batch: losses, gradients by `backward`, and a step of every optimiser. Returns the losses."""
        # Dropout and the like depend on (seed, step, process) alone, so a resumed run draws what it would have drawn.
        torch.manual_seed(_seed(self.seed, self.position.step, world()[0]))
        generator = torch.Generator().manual_seed(_seed(self.seed, self.position.step))
        losses = self.loss(self.prepare(batch, generator))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        backward(torch.stack([losses[name] for name in self.minimised]).sum())
        self.before_step()
        for optimizer in self.optimizers:
            optimizer.step()
        self.end_step()
        return {name: value.detach() for name, value in losses.items()}

    def begin_evaluation(self) -> None:
        """Called before an evaluation's first batch."""
        self.evaluator.reset()
