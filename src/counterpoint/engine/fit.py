"""Train in stages, epochs, steps and turns, with exact resumption, on one process or many.

The loop is plain PyTorch. Two properties make resumption exact:

1. Data order and all randomness of a step depend on (seed, epoch, step) alone (`loading.py`, `Stepper.prepared`).
2. The file last.ckpt holds all other state of a step: weights, optimisers, schedules, averages, the metrics so far. It is
   written as a whole after each epoch, every few minutes within an epoch, and at Ctrl-C.

Processes share each batch. After the backward pass, their gradients are averaged (`gradients.py`). This includes parameters
that only some processes reached. Therefore stages and turns need no wrapper around the learner.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from counterpoint.core.distributed import global_max
from counterpoint.core.world import alone, leave, over, processes
from counterpoint.engine.checkpoint import read_checkpoint, write_checkpoint
from counterpoint.engine.evaluation import collapse, measure
from counterpoint.engine.feed import Agreement, Feed
from counterpoint.engine.gradients import share_buffers
from counterpoint.engine.learner import Learner
from counterpoint.engine.memory import keep_freed_memory
from counterpoint.engine.options import Loop
from counterpoint.engine.progress import Bar, Stop
from counterpoint.engine.run import Run
from counterpoint.engine.services import Callback, EarlyStopping, Logged, restore_states, states
from counterpoint.engine.stages import Stage
from counterpoint.engine.state import recorded
from counterpoint.engine.stepper import Stepper
from counterpoint.errors import CounterpointError, Interrupted
from counterpoint.files import quoted

Rows = list[dict[str, float]]


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
    with recorded(run.path if run else None):
        return Fit(learner, task, loop or Loop(), evaluate_every, run, callbacks, say).go(title, bar, console)


class Fit:
    """The state of one fit: its stepper, its metrics so far, and its services."""

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
        self.stepper = Stepper(learner, task, loop, run, self.callbacks)
        self.stages = self.stepper.stages
        self.epochs = sum(stage.epochs for stage in self.stages)
        self.rows: Rows = []
        self.sums: dict[str, Tensor] = {}
        self.batches = 0  # number of batches summed in `sums`
        self.stop = Stop(_resume_hint(run))
        self.saved_at = time.monotonic()
        self.stopping = EarlyStopping(loop.patience)
        self.warned = False  # whether a collapse of the features has been reported
        self.noted_size = False  # whether a student larger than its teacher has been reported
        self.callback_states: dict[str, Any] = {}  # those in the checkpoint
        self.measured = False  # whether the test split has been measured
        self.evaluator: Any = None  # that of the test split, once measured

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
            raise CounterpointError(
                f"--log {' '.join(self.loop.log)} needs a run directory to write to; give a run, or no log"
            )
        started_group = self._join_processes()
        self.device = self.loop.on()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif self.device.type == "cpu":
            keep_freed_memory()
        self.feed, self.saving = Feed(self.device), Agreement(self.device)
        self.stepper.begin(self.device)
        resumed = self._resume()
        logged = []
        if self.run and self.first:
            logged = [Logged(n, self.run.path, title, self.run.config.get("config", {})) for n in self.loop.log]
        self.callbacks += logged  # last, so that they see what the others add to a row
        shown = Bar(title, self.epochs, console) if bar and self.first else None
        try:
            with self.stop, shown or contextlib.nullcontext():
                for callback in self.callbacks:
                    callback.on_start(learner, self.task)
                restore_states(self.callbacks, self.callback_states)
                for number, stage in list(enumerate(self.stages))[learner.position.stage :]:
                    if resumed:
                        self.stepper.resume_stage(number, resumed)
                    else:
                        self.stepper.enter(number)
                    resumed = None
                    self._compare_sizes()
                    self._warn()
                    if self._stage(stage, shown):
                        break
                self._finish()
                for callback in self.callbacks:
                    callback.on_end(self.rows)
        except RuntimeError as error:
            if processes()[1] > 1 and _of_connection(error):
                raise CounterpointError(f"another process of this training ended; {_after_loss(self.run)}") from error
            raise
        finally:
            for logger in logged:
                logger.close()
            learner.survey = None
            if started_group:
                leave()
        return self.rows

    def _join_processes(self) -> bool:
        """Join the processes that torchrun started into one group. Return whether this call made the group."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
            return False
        device = self.loop.on()
        # Gloo beside NCCL: numbers of the processor need not wait for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return True

    def _compare_sizes(self) -> None:
        """Report once that the student is larger than its teacher, which is allowed but seldom intended."""
        own, its = self.learner.sizes() or (0, 0)
        if own > its and self.first and not self.noted_size:
            self.say(f"note: the student has {own:,} parameters, more than its teacher with {its:,}")
            self.noted_size = True

    def _warn(self) -> None:
        """Show the learner's warnings, on the first process."""
        for warning in self.learner.warnings if self.first else ():
            self.say(f"warning: {warning}")
        self.learner.warnings.clear()

    def _stage(self, stage: Stage, shown: Bar | None) -> bool:
        """Train a stage to its end. Return whether the fit is over, because the test split has been measured."""
        learner, position = self.learner, self.learner.position
        last_stage = position.stage + 1 == len(self.stages)
        while position.epoch < stage.epochs:
            with contextlib.closing(self.feed.batches(self.stepper.loader)) as batches:
                for batch in batches:
                    self._add(self.stepper.step(batch))
                    position.batch += 1
                    position.step += 1
                    self.stepper.advance(per_step=True)
                    if position.batch == learner.steps_per_epoch:
                        break
                    if shown:
                        shown.at(position.all_epochs + position.batch / learner.steps_per_epoch)
                    if self._save_due():
                        self._save()
                        self._leave_if_asked()
            self.stepper.advance(per_step=False)
            share_buffers(learner)
            learner.end_epoch(position.epoch)
            row = self._epoch(stage, last=last_stage and position.epoch + 1 == stage.epochs)
            if shown:
                shown.epoch(position.all_epochs, row, stage.name if len(self.stages) > 1 else "")
            # A fit that resumes from the end of a stage enters the next one.
            self._save()
            self._leave_if_asked()
            if self.measured:
                return True
        position.next_stage()
        return False

    # --- metrics of an epoch

    def _add(self, losses: Mapping[str, Tensor]) -> None:
        """Add a step's losses to those of the epoch."""
        for name, value in losses.items():
            total = self.sums.get(name)
            value = value.detach().to(torch.float32 if self.device.type == "mps" else torch.float64)
            self.sums[name] = value if total is None else total + value
        self.batches += 1

    def _epoch(self, stage: Stage, *, last: bool) -> dict[str, float]:
        learner, position = self.learner, self.learner.position
        row: dict[str, float] = {"epoch": position.all_epochs, "step": position.all_steps}
        if len(self.stages) > 1:
            row["stage"] = position.stage
        row |= {f"train/{name}": float(total) / self.batches for name, total in self.sums.items()}
        ends = position.epoch + 1 == stage.epochs
        if stage.evaluated and ((position.epoch + 1) % self.evaluate_every == 0 or ends):
            with self.stepper.averaged():
                learner.begin_evaluation(self.stepper.survey)
                found, _, signs = measure(learner, self.task, "valid", final=False)
            row |= {f"valid/{name}": value for name, value in found.items()}
            row |= {f"watch/{name}": value for name, value in signs.items()}
            warning = collapse(signs)
            if warning and not self.warned and self.first:
                self.say(f"warning: {warning}")
                self.warned = True
            if position.stage + 1 == len(self.stages):
                self._judge(found)
        row |= self.stepper.rates()
        self.rows.append(row)
        self.sums, self.batches = {}, 0
        if last or self.stopping.over:
            self._test(row)
        for callback in self.callbacks:
            callback.on_epoch(row)
        position.epoch, position.batch = position.epoch + 1, 0
        if self.run and self.first:
            self.run.write_metrics(self.rows)
        return row

    def _test(self, row: dict[str, float]) -> None:
        """Measure the test split once, with the best weights of early stopping, else with averaged ones where there are some."""
        stepper, best = self.stepper, self.stopping.best
        if stepper.shards is not None:
            stepper.shards.gather()
        if "weights" in best:
            self.learner.load_state_dict(best.pop("weights"))
        elif stepper.average is not None:
            self.learner.load_state_dict(stepper.average.values)
        stepper.average, self.measured = None, True
        self.learner.begin_evaluation(stepper.survey)
        found, self.evaluator, _ = measure(self.learner, self.task, "test", final=True)
        row |= {f"test/{name}": value for name, value in found.items()}

    def _judge(self, found: Mapping[str, float]) -> None:
        """Compare an evaluation on `valid` with the best one, for early stopping."""
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
        worse = getattr(self.task, "lower", False)  # the smaller the headline, the better
        self.stopping.judge(-float(value) if worse else float(value), self._weights)

    def _weights(self) -> dict[str, Tensor]:
        with self.stepper.averaged():
            return {name: tensor.detach().clone() for name, tensor in self.learner.state_dict().items()}

    # --- saving and resuming

    def _save_due(self) -> bool:
        due = self.stop.asked or time.monotonic() - self.saved_at > self.loop.checkpoint_minutes * 60
        return self.saving.say(due)  # all processes save together or not at all

    def _save(self) -> None:
        self.saving.forget()
        if self.run is None:
            return
        state = (
            self._state() if self.first or self.stepper.shards else {}
        )  # divided networks are gathered by all processes
        if self.first:
            write_checkpoint(self.run, state)
        self.saved_at = time.monotonic()

    def _state(self) -> dict[str, Any]:
        return self.stepper.state() | {
            "best": self.stopping.best,
            "measured": self.measured,
            "warned": self.warned,
            "callbacks": states(self.callbacks),
            "rows": [{name: float(value) for name, value in row.items()} for row in self.rows],
            "sums": self.sums,
            "batches": self.batches,
            "feed": self.feed.totals,
        }

    def _resume(self) -> dict[str, Any] | None:
        """Restore the state of the run's checkpoint, if there is one, except that of the optimisers.

        Return the checkpoint where the fit continues within a stage, else None. The caller restores the optimisers once the
        stage has made them.
        """
        if self.run is None or not self.run.checkpoint.is_file():
            return None
        state = read_checkpoint(self.run, self.device)
        self.stepper.restore(state, self.run.checkpoint)
        position, learner = state["position"], self.learner
        self.rows, self.sums, self.batches = state["rows"], state["sums"], state["batches"]
        self.stopping.best, self.measured, self.warned = state["best"], state["measured"], state["warned"]
        self.callback_states = state["callbacks"]
        self.feed.totals |= state.get("feed", {})  # checkpoints of older versions have none
        if self.measured:
            self.stepper.average = None
            learner.position.stage = len(self.stages)
            return None
        stage = self.stages[min(position["stage"], len(self.stages) - 1)]
        if position["epoch"] < stage.epochs:
            return state
        learner.position.next_stage()  # the stage had ended: the next one begins
        after = position["stage"] + 1
        if after < len(self.stages) and self.stages[after].carry:
            self.stepper.resume_stage(position["stage"], state)
        return None

    def _leave_if_asked(self) -> None:
        if global_max(int(self.stop.asked), self.device):
            raise Interrupted(self.stop.hint)

    def _finish(self) -> None:
        """Write the files of a complete run: chance levels, figures, structure, speed, weights. Remove the checkpoint."""
        run, learner = self.run, self.learner
        if run is None or not self.first:
            return
        with alone():  # the other processes do not run this
            evaluator = self.evaluator
            if evaluator is None:  # resumed after the last epoch: measure again, because a checkpoint holds no figures
                learner.begin_evaluation(self.stepper.survey)
                _, evaluator, _ = measure(learner, self.task, "test", final=True)
            if hasattr(evaluator, "chance"):
                run.save_chance(evaluator.chance())
            training = learner.training
            learner.eval()
            run.save_figures({**getattr(evaluator, "figures", {}), **learner.figures(self.stepper.survey)})
            learner.train(training)
        run.save_structure(learner.structure())
        run.save_speed(self.feed.figures())
        run.save_weights({name: value.cpu() for name, value in learner.exported().items()})
        run.checkpoint.unlink(missing_ok=True)


def _of_connection(error: RuntimeError) -> bool:
    """Return whether an error is one of the connection to other processes: gloo has no class of errors of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _after_loss(run: Run | None) -> str:
    if run is None or not run.checkpoint.is_file():
        return "its own message says why. There is no checkpoint yet: train again"
    return (
        "its own message says why. Continue from the last checkpoint, with torchrun as before: "
        f"counterpoint train --resume {quoted(run.path)}"
    )


def _resume_hint(run: Run | None) -> str:
    if run is None:
        return "interrupted"
    return f"interrupted; nothing is lost. Continue it: counterpoint train --resume {quoted(run.path)}"
