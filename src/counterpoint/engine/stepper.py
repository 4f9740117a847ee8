"""Execute the stages and steps of a fit: parameters, batches and optimisers of a stage, the turns of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.core.divided import whole
from counterpoint.core.seeds import seed_torch
from counterpoint.core.world import processes
from counterpoint.engine.batchnorm import synchronise
from counterpoint.engine.feed import Later
from counterpoint.engine.gradients import average, share_weights
from counterpoint.engine.kept import keep_batch, random_state
from counterpoint.engine.large import check_row_wise, running
from counterpoint.engine.learner import Learner
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.services import Average, Callback
from counterpoint.engine.sharded import Shards, check_shardable, need_processes
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import teachers_of
from counterpoint.errors import CounterpointError, Interrupted, RunError, diverged
from counterpoint.files import quoted

ENTER = 1  # part of the seed: separates the random numbers of a stage's beginning from those of its steps


def seed_of(*parts: int) -> int:
    """Mix integers into one seed for torch."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) & (2**63 - 1)


class Stepper:
    """A learner in its current stage, and the steps of that stage.

    Args:
        learner: The learner. It holds the position of the fit and, from `begin` on, the survey.
        task: Provides batches.
        loop: Precision, device, large batches and other services.
        run: The run directory that keeps a batch whose loss is not finite. Default: keep none.
        callbacks: Called after each step. The caller may add to the list.

    Attributes:
        stages: The learner's stages.
        trainable: Names of the parameters that train in some stage.
        turns: The current stage's turns.
        loader: The current stage's batches.
        average: The moving average of the weights, or None.

    Raises CounterpointError for a learner without stages, or a stage without epochs.
    """

    device: torch.device

    def __init__(
        self, learner: Learner, task: Any, loop: Loop, run: Run | None = None, callbacks: Sequence[Callback] = ()
    ) -> None:
        self.learner, self.task, self.loop, self.run, self.callbacks = learner, task, loop, run, callbacks
        self.stages = _checked(learner)
        self.turns: list[Turn] = []
        self.trainable: set[str] = set()
        self.average: Average | None = None
        self.compiled: dict[tuple[int, str], Callable[..., Any]] = {}
        self.shards: Shards | None = None
        if loop.fsdp:
            check_shardable(learner, loop, self.stages)

    @property
    def survey(self) -> Survey:
        """The learner's access to the data."""
        assert self.learner.survey is not None
        return self.learner.survey

    # --- the beginning of a fit

    def begin(self, device: torch.device) -> None:
        """Prepare the learner for a fit on a device: give it access to its data, and find the parameters that train.

        Raises CounterpointError for options that its networks do not allow, and for a stage with nothing to train.
        """
        learner = self.learner
        self._use(device)
        learner.survey = Survey(self.task, learner)
        learner.begin(learner.survey)
        if self.loop.fsdp:
            need_processes()
        learner.train()
        self._check_networks()
        self._place()
        self.average = Average(learner, self.loop.ema) if self.loop.ema else None
        self._find_trainable()
        self._check_trained()

    def stand_at(self, position: Mapping[str, int]) -> None:
        """Prepare for a step at a position, without training up to it. The learner must hold its weights and survey."""
        self._use(self.loop.on())
        self.learner.train()
        self.learner.position.__dict__.update(position)
        self._find_trainable()
        self.prepare(position["stage"])

    def _use(self, device: torch.device) -> None:
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.loop.precision == "16")
        self._move()

    def _move(self) -> None:
        """Move networks and teachers to the device."""
        self.learner.to(self.device)
        for teacher in teachers_of(self.learner).values():
            teacher.to(self.device)

    def _find_trainable(self) -> None:
        self.trainable = {name for name, p in self.learner.named_parameters() if p.requires_grad}

    def _place(self) -> None:
        """Move networks and teachers to the device, and give all processes the same weights."""
        self._move()
        if processes()[1] > 1:
            synchronise(self.learner, cuda=self.device.type == "cuda")
        share_weights(self.learner)

    def _check_networks(self) -> None:
        """Raise CounterpointError where the learner's networks cannot be run in parts, or compiled, as the loop asks."""
        learner, networks = self.learner, self.learner.row_wise()
        if self.loop.accumulate > 1:
            check_row_wise(type(learner).__name__, networks)
        if self.loop.compile and not networks:
            raise CounterpointError(
                f"--compile: {type(learner).__name__} has no network that can be compiled; leave out --compile"
            )

    def _check_trained(self) -> None:
        """Raise CounterpointError, before the first step, for a stage whose modules have nothing to train."""
        names = {id(p): name for name, p in self.learner.named_parameters()}
        replaceable = False  # whether the `enter` of this or an earlier stage may have replaced modules
        for stage in self.stages:
            replaceable = replaceable or stage.enter is not None
            if stage.trains is not None and stage.learns and not replaceable:
                chosen = (names.get(id(p)) for module in stage.trains() for p in module.parameters())
                if not self.trainable.intersection(chosen):
                    raise self._untrained(stage)

    def _untrained(self, stage: Stage) -> CounterpointError:
        return CounterpointError(
            f"stage {stage.name} of {type(self.learner).__name__} trains no parameter; "
            "unfreeze a module, or correct `trains` and the optimisers of the stage"
        )

    # --- the beginning of a stage

    def enter(self, number: int) -> None:
        """Begin a stage: run its action, then choose its parameters, batches and optimisers."""
        stage, learner = self.stages[number], self.learner
        if stage.enter is not None:
            before = {name for name, _ in learner.named_parameters()}
            places = set(teachers_of(learner))
            # Seeded as a step is, so that a fit resumed here draws the same numbers. All processes draw the same ones.
            seed_torch(seed_of(learner.seed, learner.position.all_steps, number, ENTER))
            stage.enter(self.survey)
            self.trainable |= {n for n, p in learner.named_parameters() if n not in before and p.requires_grad}
            if (new := set(teachers_of(learner)) - places) and not learner.structure():
                raise CounterpointError(
                    f"stage {stage.name} of {type(learner).__name__} makes a teacher ({min(new)}) that a resumed run would "
                    f"lack; assign a snapshot to {min(new)} in the learner's constructor, and replace it in the stage's `enter`"
                )
            self._place()
            learner.train()
        self.prepare(number)
        if self.loop.ema and not stage.carry:
            self.average = Average(self.learner, self.loop.ema)  # starts anew, without the weights of the stage before

    def prepare(self, number: int) -> None:
        """Choose parameters, batches and optimisers of a stage."""
        learner, stage = self.learner, self.stages[number]
        if stage.carry and not self.turns and number:
            self.prepare(number - 1)  # makes the optimisers of the stage before, which this stage keeps
        chosen = None if stage.trains is None else {id(p) for m in stage.trains() for p in m.parameters()}
        for name, parameter in learner.named_parameters():
            mine = stage.learns and (chosen is None or id(parameter) in chosen)
            parameter.requires_grad_(name in self.trainable and mine)
        if stage.learns and not any(p.requires_grad for p in learner.parameters()):
            raise self._untrained(stage)
        if self.loop.fsdp and self.shards is None:  # after a checkpoint is restored, before the optimisers are made
            self.shards = Shards(learner)
        batches = None if stage.batches is None else stage.batches(self.survey)
        rank, size = processes()
        if batches is not None:
            batches.bind(learner.seed, learner.position, rank, size)
        if self.loop.accumulate > 1 or self.loop.compile:
            self._check_networks()
        if self.loop.compile:
            self.compiled = {(id(m), name): torch.compile(getattr(m, name)) for m, name in learner.row_wise()}
        self.loader = self.task.train_loader(learner.seed, learner.position, batches)
        learner.steps_per_epoch = len(self.loader)
        if learner.steps_per_epoch == 0:
            raise CounterpointError(
                f"stage {stage.name} of {type(learner).__name__} has no batch; use a smaller --batch-size"
            )
        learner.epochs, learner.total_steps = stage.epochs, stage.epochs * learner.steps_per_epoch
        if not (stage.carry and self.turns):
            self.turns = list((stage.turns or learner.turns)())
        held = {id(p) for turn in self.turns for o in turn.optimizers for g in o.param_groups for p in g["params"]}
        if stage.learns and not any(p.requires_grad and id(p) in held for p in learner.parameters()):
            raise self._untrained(stage)

    # --- one step

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Execute all turns of one step. Return their losses by name, as scalars."""
        learner = self.learner
        prepared = self.prepared(batch)
        found: dict[str, Tensor] = {}
        for number, turn in enumerate(self.turns):
            state = random_state() if number else None
            try:
                found |= self._turn(turn, prepared)
            except (CounterpointError, ValueError, torch.linalg.LinAlgError) as error:
                # Divided networks can be kept by all processes together only, and this one may be alone.
                if self.run is None or self.shards is not None or isinstance(error, RunError | Interrupted):
                    raise
                keep_batch(self.run, learner, batch, number, state)
                said = f"{error}\nThe batch is kept. Inspect it: counterpoint replay {quoted(self.run.path)}"
                kind = type(error) if isinstance(error, CounterpointError) else CounterpointError
                raise kind(said) from error
        learner.end_step()
        if self.average is not None:
            self.average.update()
        for callback in self.callbacks:
            callback.on_step(learner, prepared, found)
        return {name: value.detach() for name, value in found.items()}

    def _turn(self, turn: Turn, batch: dict[str, Any]) -> dict[str, Tensor]:
        learner = self.learner
        with self.networks():
            losses = self.losses(turn, batch)
            loss = losses[turn.minimise]
            finite = Later(loss.isfinite())
            if turn.optimizers:
                for optimizer in turn.optimizers:
                    optimizer.zero_grad()
                self.scaler.scale(loss).backward()
            # Asked here, so that a GPU goes on with the backward pass while the processor waits for the loss.
            if not finite.read():
                raise diverged(f"the loss is {float(loss.detach())} at step {learner.position.all_steps}")
            if not turn.optimizers:
                return losses
        average(p for o in turn.optimizers for group in o.param_groups for p in group["params"])
        # The scaler raises for an optimiser without any gradient.
        scaled = [o for o in turn.optimizers if self.scaler.is_enabled() and _reached(o)]
        for optimizer in scaled:
            self.scaler.unscale_(optimizer)
        learner.before_step()
        for optimizer in turn.optimizers:
            if not self.scaler.is_enabled():
                optimizer.step()
            elif optimizer in scaled:
                self.scaler.step(optimizer)
        if scaled:
            self.scaler.update()
        return losses

    def networks(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of a turn, in which networks run in parts or compiled, depending on the options."""
        if self.loop.accumulate == 1 and not self.compiled:
            return contextlib.nullcontext()
        return running(self.learner.row_wise(), self.loop.accumulate, self.compiled)

    def losses(self, turn: Turn, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return a turn's losses of a prepared batch."""
        with self.loop.autocast(self.device):
            return (turn.loss or self.learner.loss)(batch)

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Prepare a batch for the losses of the current step: the learner draws views, makes mixtures."""
        learner, steps = self.learner, self.learner.position.all_steps
        # Dropout depends only on (seed, step, process), so a resumed run drops the same units.
        seed_torch(seed_of(learner.seed, steps, processes()[0]))
        return learner.prepare(batch, torch.Generator().manual_seed(seed_of(learner.seed, steps)))

    def advance(self, *, per_step: bool) -> None:
        """Update the schedules of each step, or those of each epoch."""
        for turn in self.turns:
            for schedule in turn.schedules:
                if bool(getattr(schedule, "per_step", False)) == per_step:
                    schedule.step()

    def rates(self) -> dict[str, float]:
        """Return the learning rate of each optimiser, by the name of its metric."""
        optimizers = [optimizer for turn in self.turns for optimizer in turn.optimizers]
        return {f"lr/{n}" if n else "lr": o.param_groups[0]["lr"] for n, o in enumerate(optimizers)}

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the learner holds its averaged weights, if there are any."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    # --- saving and resuming

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint. All processes call it where networks are divided."""
        gathered = whole if self.shards is not None else lambda state: state
        return {
            "position": self.learner.position.state(),
            "examples": self.survey.examples,
            "trainable": sorted(self.trainable),
            "structure": self.learner.structure(),
            "learner": gathered(self.learner.state_dict()),
            "teachers": {place: teacher.state() for place, teacher in teachers_of(self.learner).items()},
            "turns": [
                {
                    "optimizers": [gathered(o.state_dict()) for o in turn.optimizers],
                    "schedules": [s.state_dict() for s in turn.schedules],
                }
                for turn in self.turns
            ],
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state(),
        }

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Restore the state of a checkpoint, except that of the optimisers, which `resume_stage` makes and restores.

        Args:
            state: What `state` returned.
            path: The checkpoint's file, for messages.

        Raises RunError for data or teachers that are not those of the checkpoint.
        """
        learner = self.learner
        if state["examples"] != self.survey.examples:
            raise RunError(
                f"the data has {self.survey.examples} training items now, this run was begun on {state['examples']}: restore "
                "the data as they were, or start a new run"
            )
        learner.restructure(state["structure"])
        learner.load_state_dict(state["learner"])
        self._place()
        self.trainable = set(state["trainable"])
        teachers = teachers_of(learner)
        if teachers.keys() != state["teachers"].keys():
            raise RunError(
                f"{path} was written with other teachers ({', '.join(state['teachers']) or 'none'}) than this "
                f"learner has ({', '.join(teachers) or 'none'}); start a new run"
            )
        for place, held in state["teachers"].items():
            teachers[place].resume(held)
        learner.position.__dict__.update(state["position"])
        if self.average is not None and state["average"]:
            self.average.resume(state["average"])
        self.scaler.load_state_dict(state["scaler"])

    def resume_stage(self, number: int, state: Mapping[str, Any]) -> None:
        """Make a stage's optimisers and restore their state from the checkpoint."""
        self.prepare(number)
        for turn, held in zip(self.turns, state["turns"], strict=True):
            for optimizer, kept in zip(turn.optimizers, held["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
                if self.shards is not None:
                    self.shards.take_up(optimizer)
            for schedule, kept in zip(turn.schedules, held["schedules"], strict=True):
                schedule.load_state_dict(kept)


def _reached(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _checked(learner: Learner) -> list[Stage]:
    stages = learner.stages()
    if not stages:
        raise CounterpointError(
            f"{type(learner).__name__} has no stage: there is nothing to train; return one from `stages`"
        )
    for stage in stages:
        if stage.epochs < 1:
            raise CounterpointError(
                f"stage {stage.name} of {type(learner).__name__} has {stage.epochs} epochs; give it at least 1"
            )
    return stages
