"""Define the base class of every trained system: a module with named losses and predictions.

It is a plain torch module, so that a trained system can be used without the engine. `engine.fit` trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from counterpoint.core.distributed import gather_rows, place, row_counts, world
from counterpoint.engine.loading import Position
from counterpoint.engine.optim import optimisers
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError


@runtime_checkable
class _Drawn(Protocol):
    """A part with figures."""

    def figures(self, survey: Survey) -> dict[str, Any]: ...


class Learner(nn.Module):
    """The base class of a trained system. Subclasses write `loss`, `predict` and `turns`, and may override the hooks.

    Attributes:
        config: The settings.
        seed: Seed of initialisation, data order, views and dropout.
        position: Position of the fit; `position.epoch` and `position.step` count from the beginning of the stage.
        epochs: Number of epochs of the current stage.
        total_steps: Number of steps of the current stage.
        steps_per_epoch: Number of steps in an epoch of the current stage.
        survey: Access to the data outside the batches; set during a fit.
    """

    config: Any

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.parts = nn.ModuleDict()  # additions to a contrastive learner, by slug (see systems.parts)
        self.position = Position()
        self.epochs = self.total_steps = self.steps_per_epoch = 0
        self.survey: Survey | None = None
        self.loaded = False  # whether weights were loaded, which those of another run must not replace
        self.register_load_state_dict_post_hook(_mark_loaded)
        self.warnings: list[str] = []  # for the user; `begin` adds them, and the fit shows each once

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    # --- stages, turns and losses

    @property
    def stage_name(self) -> str:
        """The name of the current stage; of the last one once all are done."""
        stages = self.stages()
        return stages[min(self.position.stage, len(stages) - 1)].name

    def stages(self) -> list[Stage]:
        """Return the stages of a fit, in order."""
        return [Stage("train", self.config.epochs)]

    def turns(self) -> list[Turn]:
        """Return the turns of a step, with new optimisers. The fit calls it when a stage begins."""
        raise CounterpointError(f"{type(self).__name__} has no optimiser; write its method `turns`")

    def turn_of(
        self,
        modules: Sequence[nn.Module],
        config: Any = None,
        *,
        constant: Iterable[nn.Parameter] = (),
        rate: float = 1.0,
        curve: Callable[[float], float] | None = None,
    ) -> Turn:
        """Return a turn of one optimiser, whose schedule lasts the epochs of the current stage.

        Args:
            modules: The modules to train.
            config: Settings of the optimiser, with `batch_size`. Default: the learner's.
            constant, rate, curve: See `counterpoint.engine.optim.optimisers`.
        """
        config, steps = self.config if config is None else config, self.steps_per_epoch
        return optimisers(
            config, modules, self.epochs, config.batch_size, constant, steps_per_epoch=steps, rate=rate, curve=curve
        )

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return named scalars of a batch. The fit minimises `loss` and records all."""
        raise CounterpointError(f"{type(self).__name__} has no loss; write its method `loss`")

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the outputs for an evaluation batch that the task's evaluator needs (see the task)."""
        raise CounterpointError(f"{type(self).__name__} cannot predict; write its method `predict`")

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Return metrics that the task's evaluator lacks. Called after it, on `valid` or `test`, in evaluation mode."""
        return {}

    # --- batches

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the batch as the loss takes it. Draw here all that is random at each step: views, mixtures.

        The generator's state depends on seed and step alone, not on the process. Draw for the whole batch, and take this
        process's share (`share`). Then W processes together draw the same as one process.
        """
        return batch

    def share(self, rows: int) -> tuple[int, slice]:
        """Return the number of rows of the whole batch, and the slice of it that this process's `rows` rows are."""
        rank, size = world()
        return place(rows, self.device).total if size > 1 else rows, slice(rank, None, size)

    def whole(self, rows: Tensor) -> Tensor:
        """Gather the rows of all processes, which take a batch's items in turn, in the order of the whole batch."""
        parts = gather_rows(rows).split(row_counts(len(rows), rows.device))
        whole = torch.cat(parts)
        for number, part in enumerate(parts):
            whole[number :: len(parts)] = part
        return whole

    # --- hooks

    def begin(self, survey: Survey) -> None:
        """Prepare for a fit, new or resumed. The fit reads a checkpoint only after this call."""

    def before_step(self) -> None:
        """Change a turn's gradients before its optimisers step. Parameters without a gradient are not updated."""

    def end_step(self) -> None:
        """Update moving averages or bound parameters, after all turns of a step."""

    def begin_evaluation(self, survey: Survey) -> None:
        """Fit parts that need the whole training set, before each evaluation of a fit."""

    def end_epoch(self, epoch: int) -> None:
        """Run code after an epoch's last step and before its evaluation. `epoch` counts from 0 in each stage."""

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Return figures for a run's page: heading -> {"kind": ...}, as JSON values (see counterpoint.report.found).

        The first process alone calls it, once, after the fit: `survey.over` and losses then do without the others. Default: those
        of the learner's parts.
        """
        return {
            k: v for part in self.parts.values() if isinstance(part, _Drawn) for k, v in part.figures(survey).items()
        }

    def sizes(self) -> tuple[int, int] | None:
        """Return the numbers of parameters of the student and of its teacher in this stage.

        A fit notes a student that is larger than its teacher. None, the default: there is no student, or no teacher to count.
        """
        return None

    # --- large batches and compilation

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        """Name the networks that treat each row of a batch independently: (module, method), for `accumulate` and `compile`.

        A row's result must not depend on the other rows. Empty: batches cannot be split.
        """
        return ()

    def shardable(self) -> Sequence[str]:
        """Name the networks that processes may divide among them (`--fsdp`), as paths of submodules. Empty: none.

        A loss must call them on every process, and touch their parameters in no other way.
        """
        return ()

    # --- saving

    def exported(self) -> dict[str, Tensor]:
        """Return the tensors that a run keeps as model.safetensors. Default: the whole state."""
        return dict(self.state_dict())

    def structure(self) -> dict[str, Any]:
        """Describe modules that a stage replaced, as JSON values to keep beside the weights. {} where no module was replaced."""
        return {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """Rebuild the modules that `structure` described, before the weights are loaded."""
        if structure:
            raise CounterpointError(
                f"{type(self).__name__} cannot replace modules, but the weights are of a replaced structure: {structure}; "
                "use the class that saved them"
            )


def _mark_loaded(learner: Any, keys: Any) -> None:
    learner.loaded = True
