"""Fitting a learner: Lightning's Trainer, with what a run on disk needs added as callbacks.

Exact resumption rests on three things. The data order and all randomness of a step depend on (seed, epoch, step) alone
(`loading.py`, `learner.py`). What else a step depends on (weights, optimisers, schedulers, the metrics so far) is in
last.ckpt, which is written whole after each epoch, every few minutes within one, and at Ctrl-C. And the trainer's own
loop counters are set on resumption from our `Position`, so that no half-finished state of theirs is carried over.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor

from counterpoint.engine.batchnorm import synchronise
from counterpoint.engine.learner import Learner
from counterpoint.engine.run import Run
from counterpoint.errors import Interrupted, RunError

# Lightning reports its own set-up on every start; what a user needs to know, the command line says.
for _name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class _Fitted(pl.LightningModule):
    """A learner as Lightning's Trainer wants it, for the time of a fit."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learner = learner

    def configure_optimizers(self) -> Any:
        return self.learner.configure_optimizers()

    def on_fit_start(self) -> None:
        found: Any = self.optimizers()
        self.learner.optimizers = found if isinstance(found, list) else [found]
        self.learner.start()

    def on_train_start(self) -> None:
        epochs = self.trainer.max_epochs
        assert epochs is not None  # `fit` always sets it
        self.learner.total_steps = epochs * int(self.trainer.num_training_batches)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor] | None:
        if batch_idx < self.learner.position.batch:  # done before the interruption that this run resumes from
            return None
        return self.learner.step(batch, self.manual_backward)

    def on_validation_epoch_start(self) -> None:
        self.learner.begin_evaluation()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.learner.evaluator.update(batch, self.learner.predict(batch))


class _Keeper(pl.Callback):
    """Keeps the books of a fit: position, metrics, checkpoints."""

    def __init__(self, run: Run | None, checkpoint_minutes: float, epochs: int, evaluate_every: int) -> None:
        self.run = run
        self.epochs, self.evaluate_every = epochs, evaluate_every
        self.seconds = checkpoint_minutes * 60
        self.saved_at = time.monotonic()
        self.rows: list[dict[str, float]] = []
        self.sums: dict[str, Tensor] = {}
        self.stop = False
        self.partial_epoch = 0  # batches summed in `sums`

    # state: saved in the checkpoint beside the trainer's own
    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "sums": self.sums, "partial_epoch": self.partial_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.sums, self.partial_epoch = state["rows"], state["sums"], state["partial_epoch"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        position = _learner(pl_module).position
        checkpoint["position"] = {"epoch": position.epoch, "batch": position.batch, "step": position.step}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        position = _learner(pl_module).position
        position.__dict__.update(checkpoint["position"])
        # The loops start afresh at the beginning of our epoch; the learner passes over the batches that are done.
        loops = copy.deepcopy(checkpoint["loops"])
        fit = loops["fit_loop"]
        for scope in ("total", "current"):
            fit["epoch_progress"][scope] = dict.fromkeys(fit["epoch_progress"][scope], checkpoint["position"]["epoch"])
        batches = fit["epoch_loop.batch_progress"]
        batches["is_last_batch"] = False
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["total"] = dict.fromkeys(batches["total"], checkpoint["position"]["step"])
        for progress in ("epoch_loop.val_loop.batch_progress",):
            fit[progress]["total"] = dict.fromkeys(fit[progress]["total"], 0)
            fit[progress]["current"] = dict.fromkeys(fit[progress]["current"], 0)
        checkpoint["loops"] = loops

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning has no "and after the last epoch".
        trainer.check_val_every_n_epoch = 1 if self._evaluated(_learner(pl_module).position.epoch) else 2**31

    def _evaluated(self, epoch: int) -> bool:
        return (epoch + 1) % self.evaluate_every == 0 or epoch + 1 == self.epochs

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        learner = _learner(pl_module)
        position = learner.position
        if batch_idx < position.batch:
            return
        for name, value in (outputs or {}).items():
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
        self.partial_epoch += 1
        position.batch += 1
        position.step += 1
        if trainer.is_last_batch:
            schedulers = pl_module.lr_schedulers() or []
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()  # type: ignore[call-arg]
            learner.end_epoch(position.epoch)
        elif self._due(trainer):
            self._save(trainer)
            self._leave_if_asked()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        learner = _learner(pl_module)
        position = learner.position
        row: dict[str, float] = {"epoch": position.epoch, "step": position.step}
        row |= {f"train/{name}": float(total / self.partial_epoch) for name, total in self.sums.items()}
        if self._evaluated(position.epoch):
            found = learner.evaluator.compute(final=position.epoch + 1 == self.epochs)
            row |= {f"test/{name}": value for name, value in found.items()}
            if self.run and trainer.is_global_zero and hasattr(learner.evaluator, "chance"):
                self.run.save_chance(learner.evaluator.chance())
        for number, optimizer in enumerate(trainer.optimizers):
            row["lr" if number == 0 else f"lr/{number}"] = optimizer.param_groups[0]["lr"]
        self.rows.append(row)
        self.sums, self.partial_epoch = {}, 0
        position.epoch, position.batch = position.epoch + 1, 0
        if self.run and trainer.is_global_zero:
            self.run.write_metrics(self.rows)
        self._save(trainer)
        self._leave_if_asked()

    def _due(self, trainer: pl.Trainer) -> bool:
        due = self.stop or time.monotonic() - self.saved_at > self.seconds
        # All processes save together or not at all.
        return bool(trainer.strategy.broadcast(due)) if trainer.world_size > 1 else due

    def _save(self, trainer: pl.Trainer) -> None:
        if self.run is None:
            return
        half = self.run.path / ".last.ckpt.half"
        trainer.save_checkpoint(half)
        if trainer.is_global_zero:
            os.replace(half, self.run.checkpoint)
        self.saved_at = time.monotonic()

    def _leave_if_asked(self) -> None:
        if self.stop:
            raise Interrupted(_resume_hint(self.run))


def _resume_hint(run: Run | None) -> str:
    if run is None:
        return "interrupted"
    return f"interrupted; nothing is lost. Go on with: counterpoint train --resume {run.path}"


def _learner(module: pl.LightningModule) -> Learner:
    assert isinstance(module, _Fitted)
    return module.learner


class _Bar(pl.Callback):
    """One progress bar for the whole fit, with the last epoch's figures beside it."""

    def __init__(self, keeper: _Keeper, title: str, epochs: int, console: Console | None) -> None:
        self.keeper = keeper
        self.title = title
        self.epochs = epochs
        self.progress = Progress(
            # On 80 columns the figures keep their room: the name gives way first, then the bar.
            TextColumn("{task.description}", table_column=Column(max_width=20, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console or Console(stderr=True),
            expand=True,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.start()
        done = _learner(pl_module).position.epoch
        self.task = self.progress.add_task(self.title, total=self.epochs, completed=done, figures="")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        position = _learner(pl_module).position
        self.progress.update(
            self.task, completed=position.epoch + position.batch / max(1, trainer.num_training_batches)
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        row = self.keeper.rows[-1]
        figures = "  ".join(f"{k.removeprefix('test/')} {v:.3f}" for k, v in row.items() if k.startswith("test/"))
        shown: dict[str, Any] = {"figures": figures} if figures else {}
        self.progress.update(self.task, completed=_learner(pl_module).position.epoch, **shown)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.progress.stop()


@contextlib.contextmanager
def _graceful(keeper: _Keeper) -> Iterator[None]:
    """The first Ctrl-C lets the step in hand end and saves; the second stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def on_signal(number: int, frame: Any) -> None:
        if keeper.stop:
            raise KeyboardInterrupt
        keeper.stop = True

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def fit(
    learner: Learner,
    task: Any,
    *,
    epochs: int,
    evaluate_every: int = 1,
    run: Run | None = None,
    title: str = "training",
    bar: bool = True,
    checkpoint_minutes: float = 10.0,
    console: Console | None = None,
) -> list[dict[str, float]]:
    """Fit `learner` on `task` for `epochs` passes and return the metrics, a row per epoch, those of the test data after every
    `evaluate_every`-th and the last. An earlier stage of the learner adds its passes to `epochs`.

    Under torchrun, batch normalisation takes the statistics of the whole batch (see `engine.batchnorm`).

    With a `run`, metrics and checkpoints go to disk, an existing last.ckpt is resumed from, and the weights are written
    at the end. Under torchrun (WORLD_SIZE set) the processes share each batch; every process evaluates the whole test
    set, so all hold the same figures. Raises Interrupted after Ctrl-C, RunError for a checkpoint that cannot be read.
    """
    epochs += learner.earlier_epochs
    keeper = _Keeper(run, checkpoint_minutes, epochs, evaluate_every)
    callbacks: list[pl.Callback] = [keeper]
    rank = int(os.environ.get("RANK", "0"))
    if bar and rank == 0:
        callbacks.append(_Bar(keeper, title, epochs, console))
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="gpu" if cuda else "cpu",
        devices=local if size > 1 else 1,
        num_nodes=max(1, size // local),
        strategy="auto"
        if size == 1
        else pl.strategies.DDPStrategy(
            process_group_backend="nccl" if cuda else "gloo", find_unused_parameters=learner.partial_steps
        ),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        deterministic="warn",
    )
    learner.evaluator = task.evaluator("test")
    learner.begin(task)
    if size > 1:
        synchronise(learner, cuda=cuda)

    class Loaders(pl.LightningDataModule):
        """Asked for once the processes have found each other, so that each takes its own share."""

        def train_dataloader(self) -> Any:
            return task.train_loader(learner.seed, learner.position)

        def val_dataloader(self) -> Any:
            return task.evaluation_loader("test")

    resume = str(run.checkpoint) if run and run.checkpoint.is_file() else None
    if resume:
        _check_checkpoint(run)  # type: ignore[arg-type]
    with warnings.catch_warnings(), _graceful(keeper):
        # About worker counts, log intervals and checkpoints in mid-epoch: settled above.
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric).*")
        try:
            trainer.fit(_Fitted(learner), datamodule=Loaders(), ckpt_path=resume, weights_only=True)
        except SystemExit as error:  # Lightning turns a KeyboardInterrupt into an exit
            raise Interrupted(_resume_hint(run)) from error
    if run and trainer.is_global_zero:
        run.save_figures({**getattr(learner.evaluator, "figures", {}), **learner.figures(task)})
        run.save_weights(learner.exported())
        run.checkpoint.unlink(missing_ok=True)
    return keeper.rows


def _check_checkpoint(run: Run) -> None:
    try:
        torch.load(run.checkpoint, map_location="cpu", weights_only=True, mmap=True)["position"]
    except Exception as error:  # any kind: the file cannot be resumed from, and the user must know which
        raise RunError(
            f"{run.checkpoint} cannot be resumed from ({type(error).__name__}); "
            "delete it to start this run over, or restore it from a copy"
        ) from error
