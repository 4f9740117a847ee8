"""Fine-tune any system phase after phase on a stream (`--data stream:...`), as a baseline of continual learning.

Each phase repeats the system's own stages on the phase's items, with new optimisers and schedules. Nothing keeps what was learned.
After each phase the task's headline is measured on every phase's items alone. Classifiers choose among all classes. The matrices of
valid and test are filled then, as the networks of a phase are gone later. Nothing is chosen by the test's. Measures:

    stream_last, stream_average, stream_transfer, stream_forgetting     see phases.task_figures

Tokenizers and lists of classes are of all phases. The headline must be one of which more is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey, moved
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.labelled import SemiSupervisedConfig
from counterpoint.tasks.phases import PhaseBatches, Phased, heat_map, task_figures
from counterpoint.words import counted

SPLITS = ("valid", "test")


class Sequential(Learner):
    """The phases of a learner that knows of none. It forwards to that learner, which counts its own stages alone.

    Args:
        own: the learner.
        tasks: a task for each phase, whose valid and test splits are of this phase alone.
        names: the names of the phases.
        headline: the measure of the matrices.
    """

    stream_history: Tensor  # [valid and test, after, on] headlines, NaN where unknown

    def __init__(self, own: Learner, tasks: Sequence[Any], names: Sequence[str], headline: str) -> None:
        super().__init__(own.seed)
        self.own, self.config, self.warnings = own, own.config, own.warnings
        self.stream_tasks, self.stream_names, self.headline = list(tasks), list(names), headline
        unknown = torch.full((len(SPLITS), len(names), len(names)), float("nan"))
        self.register_buffer("stream_history", unknown)

    def followed(self) -> Learner:
        """Return the learner, at its position in the current phase, as if the phase were the whole fit."""
        own, each = self.own, len(self.own.stages())
        own.position.__dict__.update(self.position.__dict__)
        over = self.position.stage >= each * len(self.stream_names)  # after the fit
        own.position.stage = each if over else self.position.stage % each
        own.epochs, own.total_steps, own.steps_per_epoch = self.epochs, self.total_steps, self.steps_per_epoch
        own.survey = self.survey
        return own

    def _following(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            self.followed()
            return call(*arguments)

        return called

    # --- stages

    def stages(self) -> list[Stage]:
        own = self.own.stages()
        for stage in own:
            if stage.batches is not None:
                raise CounterpointError(
                    f"{type(self.own).__name__} chooses the batches of its stage '{stage.name}' by itself, so it cannot be run "
                    "over a stream; name a system without such a stage"
                )
        names = [(p, stage, name) for p, name in enumerate(self.stream_names) for stage in own]
        return [
            replace(
                stage,
                name=name if len(own) == 1 else f"{name}, {stage.name}",
                batches=partial(self._phase_batches, phase),
                carry=stage.carry and stage is not own[0],
                enter=None if stage.enter is None else self._following(stage.enter),
                turns=None if stage.turns is None else self._following(stage.turns),
            )
            for phase, stage, name in names
        ]

    def _phase_batches(self, phase: int, survey: Survey) -> Batches:
        return PhaseBatches(np.flatnonzero(self._phase_of(survey) == phase), survey.batch_size)

    def _phase_of(self, survey: Survey) -> Any:
        return np.asarray(survey.split().domains)[survey.rows]

    def begin(self, survey: Survey) -> None:
        self.followed().begin(survey)
        counts = np.bincount(self._phase_of(survey), minlength=len(self.stream_names))
        least, size = int(counts.argmin()), survey.batch_size
        if counts[least] < size:
            raise DataError(
                f"phase '{self.stream_names[least]}' has {counted(int(counts[least]), 'training item')}, fewer than a batch of "
                f"{size}; use "
                f"--batch-size {max(2, int(counts[least]))} or less, or fewer ?phases=N"
            )

    def end_epoch(self, epoch: int) -> None:
        self.followed().end_epoch(epoch)
        each = len(self.own.stages())
        if (self.position.stage + 1) % each or epoch != self.epochs - 1 or self.survey is None:
            return
        self.begin_evaluation(self.survey)
        phase = self.position.stage // each
        for at, split in enumerate(SPLITS):
            for p, task in enumerate(self.stream_tasks):
                self.stream_history[at, phase, p] = self._measured(task, split)

    def _measured(self, task: Any, split: str) -> float:
        """Return the headline on one phase's items; NaN where the evaluator has none."""
        evaluator, training = task.evaluator(split), self.training
        self.eval()
        with torch.no_grad():
            for batch in task.evaluation_loader(split):
                batch = moved(batch, self.device)
                evaluator.update(batch, self.predict(batch))
        self.train(training)
        return float(evaluator.compute(final=False).get(self.headline, float("nan")))

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        found = self.followed().measures(survey, split)
        matrix = self.stream_history[SPLITS.index(split)].cpu().double().numpy()
        if np.isnan(matrix).all(1).any():
            return found
        return found | {f"stream_{name}": value for name, value in task_figures(matrix).items()}

    def figures(self, survey: Survey) -> dict[str, Any]:
        matrix = self.stream_history[1].cpu().double().numpy()
        said = f"{self.headline.replace('_', ' ').capitalize()} on test items of each phase."
        shown = self.followed().figures(survey)
        return shown | {"What each phase kept": heat_map(matrix, self.stream_names, said)}

    # --- hooks that the learner alone answers

    def turns(self) -> list[Turn]:
        return self.followed().turns()

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return self.followed().prepare(batch, generator)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.followed().loss(batch)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self.followed().predict(batch)

    def before_step(self) -> None:
        self.followed().before_step()

    def end_step(self) -> None:
        self.followed().end_step()

    def begin_evaluation(self, survey: Survey) -> None:
        self.followed().begin_evaluation(survey)

    def sizes(self) -> tuple[int, int] | None:
        return self.followed().sizes()

    def row_wise(self) -> Any:
        return self.followed().row_wise()

    def structure(self) -> dict[str, Any]:
        return self.own.structure()

    def restructure(self, structure: Mapping[str, Any]) -> None:
        self.own.restructure(structure)

    def exported(self) -> dict[str, Tensor]:
        return self.own.exported()


def phase_data(data: Any) -> list[Any]:
    """Return the data of each phase of a stream: the whole training split, and its own valid and test items."""
    found = []
    for phase in range(len(data.domains)):
        parts = {split: getattr(data, split) for split in SPLITS}
        found.append(
            replace(data, **{split: part.take(np.flatnonzero(part.domains == phase)) for split, part in parts.items()})
        )
    return found


def over_stream(learner: Learner, task: Any, tasks: Sequence[Any]) -> Learner:
    """Return a learner that trains over the phases of a stream. One that has phases of its own is returned as it is.

    Args:
        learner: any learner.
        task: the task on all of the stream.
        tasks: the tasks on each phase's data (`phase_data`).

    Raises CounterpointError for a learner that hides labels, and for a headline of which less is better.
    """
    if isinstance(learner, Phased):
        return learner
    if isinstance(task.config, SemiSupervisedConfig) or getattr(task.config, "images_per_class", 0) > 0:
        raise CounterpointError(
            f"{type(learner).__name__} composes its batches by labels, which a stream's phases would undo; set "
            "--images-per-class 0, or name a system that draws all items alike"
        )
    if bool(getattr(task, "lower", False)):
        raise CounterpointError(
            f"the measure {task.headline} is an error, of which a stream has no transfer or forgetting"
        )
    return Sequential(learner, tasks, task.data.domains, task.headline)
