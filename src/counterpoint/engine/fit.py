"""Train in stages, epochs, steps and turns, with exact resumption, on one process or many.

The loop is plain PyTorch. Two properties make resumption exact:

1. Data order and all randomness of a step depend on (seed, epoch, step) alone (`loading.py`, `Fit.step`).
2. The file last.ckpt holds all other state of a step: weights, optimisers, schedules, averages, the metrics so far. It is
   written as a whole after each epoch, every few minutes within an epoch, and at Ctrl-C.

Processes share each batch. Their gradients are averaged after the backward pass (`gradients.py`), whichever parameters a
step reached. Therefore stages and turns need no wrapper around the learner.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor

from counterpoint.core.world import over, processes
from counterpoint.engine.batchnorm import synchronise
from counterpoint.engine.evaluation import collapse, measure
from counterpoint.engine.gradients import average, share_buffers, share_weights
from counterpoint.engine.kept import keep_batch, random_state
from counterpoint.engine.large import check_row_wise, running
from counterpoint.engine.learner import Learner
from counterpoint.engine.memory import keep_freed_memory
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.services import Average, Callback, Logged, states, take_up_states
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey, moved
from counterpoint.engine.teachers import teachers_of
from counterpoint.errors import CounterpointError, Interrupted, RunError

Rows = list[dict[str, float]]
ENTER = 1  # part of the seed: separates the random numbers of a stage's beginning from those of its steps


def seed_of(*parts: int) -> int:
    """Mix integers into one seed for torch."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) & (2**63 - 1)


def fit(
    learner: Learner,
    task: Any,
    *,
    loop: Loop | None = None,
    evaluate_every: int = 1,
    run: Run | None = None,
    title: str = "training",
    bar: bool = True,
    console: Console | None = None,
    callbacks: Sequence[Callback] = (),
    say: Callable[[str], None] | None = None,
) -> Rows:
    """Train a learner through its stages. Return the metrics, a row per epoch.

    `valid/...` is measured after every `evaluate_every`-th epoch of a stage and after its last epoch. `test/...` is measured
    once, at the end, in the last row. With a `run`, metrics and checkpoints are written to disk, and the weights at the end.
    Where the run has a last.ckpt, training resumes from it.

    Under torchrun (WORLD_SIZE set) processes share each batch. Batch normalisation uses the statistics of the whole batch.
    Every process measures the whole split, so all hold the same metrics.

    Args:
        learner: The learner to train, in place.
        task: Provides batches, splits and the evaluator.
        loop: Precision, device, large batches and other services. Default: float32, on the GPU if there is one.
        evaluate_every: Number of epochs between evaluations on `valid`; at least 1.
        run: The run directory to write to, and to resume from. Default: write nothing.
        title: Title of the progress bar.
        bar: Whether to show a progress bar.
        console: The progress bar's console. Default: standard error.
        callbacks: Called at each step and each epoch.
        say: Receives warnings. Default: they are printed on standard error.

    Raises Interrupted after Ctrl-C, RunError for a checkpoint that cannot be read, CounterpointError for stages that cannot
    be trained.
    """
    return Fit(learner, task, loop or Loop(), evaluate_every, run, callbacks, say).go(title, bar, console)


class Fit:
    """The state of one fit."""

    def __init__(
        self,
        learner: Learner,
        task: Any,
        loop: Loop,
        evaluate_every: int,
        run: Run | None,
        callbacks: Sequence[Callback],
        say: Callable[[str], None] | None,
    ) -> None:
        self.learner, self.task, self.loop, self.run = learner, task, loop, run
        self.evaluate_every, self.callbacks = evaluate_every, list(callbacks)
        self.say = say or Console(stderr=True, soft_wrap=True).print
        self.stages = _checked(learner)
        self.epochs = sum(stage.epochs for stage in self.stages)
        self.turns: list[Turn] = []
        self.rows: Rows = []
        self.sums: dict[str, Tensor] = {}
        self.batches = 0  # number of batches summed in `sums`
        self.stop = False
        self.saved_at = time.monotonic()
        self.average: Average | None = None
        self.best: dict[str, Any] = {}  # for early stopping: best value, its weights, number of evaluations since
        self.warned = False
        self.held: dict[str, Any] = {}  # states of callbacks in the checkpoint
        self.measured = False  # whether the test split has been measured
        self.compiled: dict[tuple[int, str], Callable[..., Any]] = {}

    @property
    def first(self) -> bool:
        """Whether this process writes the files: process 0."""
        return processes()[0] == 0

    # --- from beginning to end

    def go(self, title: str, bar: bool, console: Console | None) -> Rows:
        """Train to the end, with losses over the batch of all processes."""
        with over("world"):
            return self._go(title, bar, console)

    def _go(self, title: str, bar: bool, console: Console | None) -> Rows:
        learner = self.learner
        if self.loop.log and self.run is None:
            raise CounterpointError(f"--log {' '.join(self.loop.log)} needs a run directory to write to")
        started_group = self._meet()
        self.device = self.loop.on(int(os.environ.get("LOCAL_RANK", "0")))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif self.device.type == "cpu":
            keep_freed_memory()
        learner.to(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.loop.precision == "16")
        for teacher in teachers_of(learner).values():
            teacher.to(self.device)
        self.survey = learner.survey = Survey(self.task, learner)
        learner.begin(self.survey)
        learner.train()
        self._check_networks()
        if processes()[1] > 1:
            synchronise(learner, cuda=self.device.type == "cuda")
        share_weights(learner)
        self.average = Average(learner, self.loop.ema) if self.loop.ema else None
        # Parameters that learn in some stage.
        self.trainable = {name for name, p in learner.named_parameters() if p.requires_grad}
        self._check_trained()
        resumed = self._resume()
        logged = []
        if self.run and self.first:
            logged = [Logged(n, self.run.path, title, self.run.config.get("config", {})) for n in self.loop.log]
        self.callbacks += logged  # last, so that they see what the others add to a row
        shown = _Bar(title, self.epochs, console) if bar and self.first else None
        try:
            with _graceful(self), shown or contextlib.nullcontext():
                for callback in self.callbacks:
                    callback.on_start(learner, self.task)
                take_up_states(self.callbacks, self.held)
                for number, stage in list(enumerate(self.stages))[learner.position.stage :]:
                    if resumed:
                        self._take_up(number, resumed)
                    else:
                        self._enter(number)
                    resumed = None
                    if self._stage(stage, shown):
                        break
                self._finish()
                for callback in self.callbacks:
                    callback.on_end(self.rows)
        finally:
            for logger in logged:
                logger.close()
            learner.survey = None
            if started_group:
                dist.destroy_process_group()
        return self.rows

    def _meet(self) -> bool:
        """Make the process group where torchrun started several processes. Return whether this call made it."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
            return False
        device = self.loop.on(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return True

    def _enter(self, number: int) -> None:
        """Begin a stage."""
        stage, learner = self.stages[number], self.learner
        if stage.enter is not None:
            before = {name for name, _ in learner.named_parameters()}
            places = set(teachers_of(learner))
            # Seeded as in a step: a fit resumed at the boundary draws the same numbers. All processes draw alike.
            torch.manual_seed(seed_of(learner.seed, learner.position.all_steps, number, ENTER))
            stage.enter(self.survey)
            self.trainable |= {n for n, p in learner.named_parameters() if n not in before and p.requires_grad}
            if (new := set(teachers_of(learner)) - places) and not learner.structure():
                raise CounterpointError(
                    f"stage {stage.name} of {type(learner).__name__} makes a teacher ({min(new)}) that a resumed run would "
                    f"lack; assign a snapshot to {min(new)} in the learner's constructor, and replace it in the stage's `enter`"
                )
            self._at_home()
            learner.train()
        self._prepare(number)
        if self.loop.ema and not stage.carry:
            self.average = Average(self.learner, self.loop.ema)  # does not include weights of the stage before

    def _check_networks(self) -> None:
        """Raise CounterpointError where the learner's networks cannot be run in parts, or compiled, as the loop asks."""
        learner, networks = self.learner, self.learner.row_wise()
        if self.loop.accumulate > 1:
            check_row_wise(type(learner).__name__, networks)
        if self.loop.compile and not networks:
            raise CounterpointError(
                f"--compile: {type(learner).__name__} has no network that can be compiled; leave out --compile"
            )

    def _at_home(self) -> None:
        """Move networks and teachers to the device, and give all processes the same weights."""
        self.learner.to(self.device)
        for teacher in teachers_of(self.learner).values():
            teacher.to(self.device)
        if processes()[1] > 1:
            synchronise(self.learner, cuda=self.device.type == "cuda")
        share_weights(self.learner)

    def _check_trained(self) -> None:
        """Raise CounterpointError, before the first step, for a stage whose modules have nothing to train."""
        names = {id(p): name for name, p in self.learner.named_parameters()}
        later = False  # whether the `enter` of a stage may replace modules
        for stage in self.stages:
            later = later or stage.enter is not None
            if stage.trains is not None and not later:
                chosen = (names.get(id(p)) for module in stage.trains() for p in module.parameters())
                if not self.trainable.intersection(chosen):
                    raise self._untrained(stage)

    def _untrained(self, stage: Stage) -> CounterpointError:
        return CounterpointError(
            f"stage {stage.name} of {type(self.learner).__name__} trains no parameter; "
            "unfreeze a module, or correct `trains` and the optimisers of the stage"
        )

    def _prepare(self, number: int) -> None:
        """Choose parameters, batches and optimisers of a stage."""
        learner, stage = self.learner, self.stages[number]
        if stage.carry and not self.turns and number:
            self._prepare(number - 1)  # makes the optimisers of the stage before, which this stage carries
        chosen = None if stage.trains is None else {id(p) for m in stage.trains() for p in m.parameters()}
        for name, parameter in learner.named_parameters():
            parameter.requires_grad_(name in self.trainable and (chosen is None or id(parameter) in chosen))
        if not any(p.requires_grad for p in learner.parameters()):
            raise self._untrained(stage)
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
        if not any(p.requires_grad and id(p) in held for p in learner.parameters()):
            raise self._untrained(stage)

    def _stage(self, stage: Stage, shown: _Bar | None) -> bool:
        """Train a stage to its end. Return whether the fit is over: its test split has been measured."""
        learner, position = self.learner, self.learner.position
        last_stage = position.stage + 1 == len(self.stages)
        while position.epoch < stage.epochs:
            for batch in self.loader:
                losses = self.step(moved(batch, self.device))
                for name, value in losses.items():
                    total = self.sums.get(name)
                    value = value.detach().to(torch.float32 if self.device.type == "mps" else torch.float64)
                    self.sums[name] = value if total is None else total + value
                self.batches += 1
                position.batch += 1
                position.step += 1
                for turn in self.turns:
                    for schedule in turn.schedules:
                        if getattr(schedule, "per_step", False):
                            schedule.step()
                if position.batch == learner.steps_per_epoch:
                    break
                if shown:
                    shown.at(position.all_epochs + position.batch / learner.steps_per_epoch)
                if self._due():
                    self._save()
                    self._leave_if_asked()
            for turn in self.turns:
                for schedule in turn.schedules:
                    if not getattr(schedule, "per_step", False):
                        schedule.step()
            share_buffers(learner)
            learner.end_epoch(position.epoch)
            row = self._epoch(stage, last=last_stage and position.epoch + 1 == stage.epochs)
            if shown:
                shown.epoch(position.all_epochs, row, stage.name if len(self.stages) > 1 else "")
            # Save the end of a stage as the beginning of the next; a resumed fit enters that stage again.
            self._save()
            self._leave_if_asked()
            if self.measured:
                return True
        position.next_stage()
        return False

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
                if self.run is None or isinstance(error, RunError | Interrupted):
                    raise
                keep_batch(self.run, learner, batch, number, state)
                said = f"{error}\nThe batch is kept. Inspect it: counterpoint replay {self.run.path}"
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
            if not bool(loss.isfinite()):
                raise CounterpointError(
                    f"the loss is {float(loss.detach())} at step {learner.position.all_steps}: training diverged; lower --lr"
                )
            for optimizer in turn.optimizers:
                optimizer.zero_grad()
            self.scaler.scale(loss).backward()
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

    # --- metrics of an epoch

    def _epoch(self, stage: Stage, *, last: bool) -> dict[str, float]:
        learner, position = self.learner, self.learner.position
        row: dict[str, float] = {"epoch": position.all_epochs, "step": position.all_steps}
        if len(self.stages) > 1:
            row["stage"] = position.stage
        row |= {f"train/{name}": float(total) / self.batches for name, total in self.sums.items()}
        ends = position.epoch + 1 == stage.epochs
        if stage.evaluated and ((position.epoch + 1) % self.evaluate_every == 0 or ends):
            with self._averaged():
                learner.begin_evaluation(self.survey)
                found, _, signs = measure(learner, self.task, "valid", final=False)
            row |= {f"valid/{name}": value for name, value in found.items()}
            row |= {f"watch/{name}": value for name, value in signs.items()}
            warning = collapse(signs)
            if warning and not self.warned and self.first:
                self.say(f"warning: {warning}")
                self.warned = True
            if position.stage + 1 == len(self.stages):
                self._judge(found)
        for number, optimizer in enumerate(o for turn in self.turns for o in turn.optimizers):
            row["lr" if number == 0 else f"lr/{number}"] = optimizer.param_groups[0]["lr"]
        self.rows.append(row)
        self.sums, self.batches = {}, 0
        if last or self._stopped():
            self._test(row)
        for callback in self.callbacks:
            callback.on_epoch(row)
        position.epoch, position.batch = position.epoch + 1, 0
        if self.run and self.first:
            self.run.write_metrics(self.rows)
        return row

    def _test(self, row: dict[str, float]) -> None:
        """Measure the test split once. With early stopping use the best weights, else the averaged ones if there are any."""
        if "weights" in self.best:
            self.learner.load_state_dict(self.best.pop("weights"))
        elif self.average is not None:
            self.learner.load_state_dict(self.average.values)
        self.average, self.measured = None, True
        self.learner.begin_evaluation(self.survey)
        found, self.evaluator, _ = measure(self.learner, self.task, "test", final=True)
        row |= {f"test/{name}": value for name, value in found.items()}

    def stand_at(self, position: Mapping[str, int]) -> None:
        """Prepare for a step at a position, without training up to it. The learner must hold its weights already."""
        self.device = self.loop.on()
        self.learner.to(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        for teacher in teachers_of(self.learner).values():
            teacher.to(self.device)
        self.learner.train()
        self.learner.position.__dict__.update(position)
        self.trainable = {name for name, p in self.learner.named_parameters() if p.requires_grad}
        self._prepare(position["stage"])

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch as the losses of the current step take it: views drawn, mixtures made."""
        learner, steps = self.learner, self.learner.position.all_steps
        # Dropout depends on (seed, step, process) alone, so a resumed run draws the same numbers.
        torch.manual_seed(seed_of(learner.seed, steps, processes()[0]))
        return learner.prepare(batch, torch.Generator().manual_seed(seed_of(learner.seed, steps)))

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    # --- early stopping

    def _judge(self, found: Mapping[str, float]) -> None:
        if not self.loop.patience:
            return
        name = self.task.headline
        if name not in found:
            raise CounterpointError(
                f"--patience: early stopping needs the metric {name} on valid, and this learner has none; leave out --patience"
            )
        value = torch.tensor(found[name], dtype=torch.float64, device=self.device)
        if processes()[1] > 1:
            dist.broadcast(value, 0)  # so that all processes stop at the same epoch
        if not self.best or float(value) > self.best["value"] or math.isnan(self.best["value"]):
            with self._averaged():
                weights = {key: tensor.detach().clone() for key, tensor in self.learner.state_dict().items()}
            self.best = {"value": float(value), "weights": weights, "since": 0}
        else:
            self.best["since"] += 1

    def _stopped(self) -> bool:
        return bool(self.loop.patience and self.best and self.best["since"] >= self.loop.patience)

    # --- saving and resuming

    def _due(self) -> bool:
        due = self.stop or time.monotonic() - self.saved_at > self.loop.checkpoint_minutes * 60
        if processes()[1] == 1:
            return due
        # All processes save together or not at all.
        flag = torch.tensor(float(due), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _save(self) -> None:
        if self.run is None:
            return
        if self.first:
            half = self.run.path / ".last.ckpt.half"
            torch.save(self._state(), half)
            os.replace(half, self.run.checkpoint)
        self.saved_at = time.monotonic()

    def _state(self) -> dict[str, Any]:
        return {
            "position": self.learner.position.state(),
            "examples": self.survey.examples,
            "trainable": sorted(self.trainable),
            "structure": self.learner.structure(),
            "learner": self.learner.state_dict(),
            "teachers": {place: teacher.state() for place, teacher in teachers_of(self.learner).items()},
            "turns": [
                {
                    "optimizers": [o.state_dict() for o in turn.optimizers],
                    "schedules": [s.state_dict() for s in turn.schedules],
                }
                for turn in self.turns
            ],
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state(),
            "best": self.best,
            "measured": self.measured,
            "warned": self.warned,
            "callbacks": states(self.callbacks),
            "rows": [{name: float(value) for name, value in row.items()} for row in self.rows],
            "sums": self.sums,
            "batches": self.batches,
        }

    def _resume(self) -> dict[str, Any] | None:
        """Restore all but the optimisers from the run's checkpoint, if there is one. The stage must make them first.

        Return the checkpoint where the fit continues within a stage, else None.
        """
        if self.run is None or not self.run.checkpoint.is_file():
            return None
        state = read_checkpoint(self.run, self.device)
        position = state["position"]
        learner = self.learner
        if state["examples"] != self.survey.examples:
            raise RunError(
                f"the data has {self.survey.examples} training items now, this run was begun on {state['examples']}: restore "
                "the data as they were, or start a new run"
            )
        learner.restructure(state["structure"])
        learner.load_state_dict(state["learner"])
        self._at_home()
        self.trainable = set(state["trainable"])
        teachers = teachers_of(learner)
        if teachers.keys() != state["teachers"].keys():
            raise RunError(
                f"{self.run.checkpoint} was written with other teachers ({', '.join(state['teachers']) or 'none'}) than this "
                f"learner has ({', '.join(teachers) or 'none'}); start a new run"
            )
        for place, held in state["teachers"].items():
            teachers[place].resume(held)
        learner.position.__dict__.update(position)
        self.rows, self.sums, self.batches = state["rows"], state["sums"], state["batches"]
        self.best, self.measured, self.warned = state["best"], state["measured"], state["warned"]
        self.held = state["callbacks"]
        if self.average is not None and state["average"]:
            self.average.resume(state["average"])
        self.scaler.load_state_dict(state["scaler"])
        if self.measured:
            self.average = None
            learner.position.stage = len(self.stages)
            return None
        stage = self.stages[min(position["stage"], len(self.stages) - 1)]
        if position["epoch"] < stage.epochs:
            return state
        learner.position.next_stage()  # the stage had ended: the next one begins
        after = position["stage"] + 1
        if after < len(self.stages) and self.stages[after].carry:
            self._take_up(position["stage"], state)
        return None

    def _take_up(self, number: int, state: Mapping[str, Any]) -> None:
        """Make a stage's optimisers and restore their state from the checkpoint."""
        self._prepare(number)
        for turn, held in zip(self.turns, state["turns"], strict=True):
            for optimizer, kept in zip(turn.optimizers, held["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            for schedule, kept in zip(turn.schedules, held["schedules"], strict=True):
                schedule.load_state_dict(kept)

    def _leave_if_asked(self) -> None:
        stop = self.stop
        if processes()[1] > 1:
            flag = torch.tensor(float(stop), device=self.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            stop = bool(flag)
        if stop:
            raise Interrupted(_resume_hint(self.run))

    def _finish(self) -> None:
        """Write the files of a complete run: chance levels, figures, structure, weights. Remove the checkpoint."""
        run, learner = self.run, self.learner
        if run is None or not self.first:
            return
        evaluator = getattr(self, "evaluator", None)
        if evaluator is None:  # resumed after the last epoch: measure again, for the evaluator's figures
            learner.begin_evaluation(self.survey)
            _, evaluator, _ = measure(learner, self.task, "test", final=True)
        if hasattr(evaluator, "chance"):
            run.save_chance(evaluator.chance())
        training = learner.training
        learner.eval()
        run.save_figures({**getattr(evaluator, "figures", {}), **learner.figures(self.survey)})
        learner.train(training)
        run.save_structure(learner.structure())
        run.save_weights({name: value.cpu() for name, value in learner.exported().items()})
        run.checkpoint.unlink(missing_ok=True)


def read_checkpoint(run: Run, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a run's last.ckpt. Raise RunError, naming the file, when it is damaged or of an older version."""
    if _of_lightning(run.checkpoint):
        raise RunError(
            f"{run.checkpoint} is from an older version of counterpoint, and this version cannot resume it; finish the run "
            "with the older version, or delete the file to start this run over"
        )
    try:
        state = dict(torch.load(run.checkpoint, map_location=device, weights_only=True))
        state["position"] = dict(state["position"])
        missing = {"examples", "trainable", "teachers", "turns", "rows"} - state.keys()
        if missing:
            raise KeyError(", ".join(sorted(missing)))
    except Exception as error:  # of any kind: the message must name the file
        raise RunError(
            f"{run.checkpoint} cannot be resumed from ({type(error).__name__}); delete it to start this run over, or restore it "
            "from a copy"
        ) from error
    return state


def _of_lightning(path: Path) -> bool:
    """Return whether a version of this package that trained with PyTorch Lightning wrote a checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return any(b"pytorch-lightning_version" in archive.read(name) for name in names)
    except (OSError, zipfile.BadZipFile):
        return False


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


def _resume_hint(run: Run | None) -> str:
    if run is None:
        return "interrupted"
    return f"interrupted; nothing is lost. Continue it: counterpoint train --resume {run.path}"


@contextlib.contextmanager
def _graceful(fit: Fit) -> Iterator[None]:
    """Handle Ctrl-C in the block: the first one finishes the current step and saves, the second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def on_signal(number: int, frame: Any) -> None:
        if fit.stop:
            raise Interrupted(_resume_hint(fit.run))
        fit.stop = True

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Bar:
    """One progress bar for the whole fit, with the last evaluation's metrics beside it."""

    def __init__(self, title: str, epochs: int, console: Console | None) -> None:
        self.title, self.epochs = title, epochs
        self.progress = Progress(
            # On 80 columns the metrics keep their width: the title is shortened first, then the bar.
            TextColumn("{task.description}", table_column=Column(max_width=20, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console or Console(stderr=True),
            expand=True,
        )
        self.task: Any = None

    def __enter__(self) -> _Bar:
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=self.epochs, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def at(self, epochs: float) -> None:
        self.progress.update(self.task, completed=epochs)

    def epoch(self, epochs: int, row: Mapping[str, float], stage: str) -> None:
        figures = "  ".join(f"{k.partition('/')[2]} {v:.3f}" for k, v in row.items() if k.startswith("valid/"))
        shown: dict[str, Any] = {"figures": f"{stage} {figures}".strip()} if figures or stage else {}
        self.progress.update(self.task, completed=epochs, **shown)
