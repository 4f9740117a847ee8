"""The base of every trained system: a module that names its losses and what it predicts.

It is a plain torch module, so that a trained system is used without the engine. `engine.fit` trains it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.core.distributed import place, world
from counterpoint.engine.loading import Position
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError


class Learner(nn.Module):
    """Subclasses write `loss`, `predict` and `turns`; networks, optimisers and hooks are theirs to choose.

    Attributes:
        config: the settings.
        seed: of initialisation, data order, views and dropout.
        position: where the fit stands; `position.epoch` and `position.step` count from the beginning of the stage.
        epochs, total_steps: of the stage at hand.
        steps_per_epoch: of the stage at hand.
        survey: what the learner may know of its data; there for the time of a fit.
    """

    config: Any

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.parts = nn.ModuleDict()  # additions over a contrastive learner, by slug (see systems.parts)
        self.position = Position()
        self.epochs = self.total_steps = self.steps_per_epoch = 0
        self.survey: Survey | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    # --- what is trained, in which order

    def stages(self) -> list[Stage]:
        """Return the stages of a fit, in order."""
        return [Stage("train", self.config.epochs)]

    def turns(self) -> list[Turn]:
        """Return the turns of a step, with new optimisers. Called when a stage begins."""
        raise CounterpointError(f"{type(self).__name__} has no optimiser")

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return named scalars of a batch; `loss` is minimised, all are recorded."""
        raise CounterpointError(f"{type(self).__name__} has no loss")

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what the task's evaluator wants of an evaluation batch (see the task)."""
        raise CounterpointError(f"{type(self).__name__} cannot predict")

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure what the task's evaluator does not; called after it, on `valid` or `test`, in evaluation mode."""
        return {}

    # --- batches

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the batch as the loss wants it: views, mixtures, whatever is drawn anew at each step.

        The generator's state depends on seed and step alone, not on the process. Draw for the whole batch and take this
        process's share (`share`), so that W processes see what one would.
        """
        return batch

    def share(self, rows: int) -> tuple[int, slice]:
        """Return how many rows the whole batch has, and which of them are this process's, which has `rows`."""
        rank, size = world()
        return place(rows, self.device).total if size > 1 else rows, slice(rank, None, size)

    # --- hooks

    def begin(self, survey: Survey) -> None:
        """Called before a fit, new or resumed; a checkpoint is read after it."""

    def before_step(self) -> None:
        """Called when a turn's gradients are there, before its optimisers step. A parameter without one stays as it is."""

    def end_step(self) -> None:
        """Called after all turns of a step: moving averages, bounds on parameters."""

    def begin_evaluation(self, survey: Survey) -> None:
        """Called before each evaluation of a fit: what must be fitted to the whole training set first."""

    def end_epoch(self, epoch: int) -> None:
        """Called after an epoch's last step and before its evaluation; `epoch` counts from the beginning of the stage."""

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Return what a run's page shows besides numbers: heading -> {"kind": ...}, fit for JSON (counterpoint.report.found).

        Called once, after the fit, by the first process alone.
        """
        return {}

    # --- large batches and compilation

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        """Name the networks that see each row of a batch by itself: (module, method), for `accumulate` and `compile`.

        Their results must not depend on what else is in the batch. Empty: batches cannot be cut.
        """
        return ()

    # --- saving

    def exported(self) -> dict[str, Tensor]:
        """Return what a run keeps as model.safetensors; default: everything."""
        return dict(self.state_dict())

    def structure(self) -> dict[str, Any]:
        """Describe modules that a stage replaced, fit for JSON: kept beside the weights. {} where nothing was replaced."""
        return {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """Give the modules the structure that `structure` described; called before weights of that structure are read."""
        if structure:
            raise CounterpointError(f"{type(self).__name__} has one form only, the weights have another: {structure}")
