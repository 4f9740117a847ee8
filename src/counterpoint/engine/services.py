"""Services of the loop: callbacks, loggers, a moving average of the weights. Its options are in `options.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.engine.options import logger_module


class Callback:
    """What a fit tells a Python caller. Subclasses write the methods they need.

    >>> class Printer(Callback):
    ...     def on_epoch(self, row):
    ...         print(row["epoch"], row["train/loss"])
    """

    def on_start(self, learner: nn.Module, task: Any) -> None:
        """Called once, before the first step of a fit, new or resumed."""

    def on_step(self, learner: nn.Module, batch: dict[str, Any], losses: Mapping[str, Tensor]) -> None:
        """Called after each step, with the prepared batch and its losses."""

    def on_epoch(self, row: dict[str, float]) -> None:
        """Called after each epoch with its row of figures. What it adds to the row is recorded."""

    def on_end(self, rows: list[dict[str, float]]) -> None:
        """Called once, after the last epoch."""


class Logged(Callback):
    """Sends each epoch's figures to TensorBoard, W&B or MLflow.

    Args:
        name: one of `LOGGERS`.
        folder: of the run; TensorBoard writes below it.
        title: name of the run.
        settings: shown beside the curves.
    """

    def __init__(self, name: str, folder: Any, title: str, settings: Mapping[str, Any]) -> None:
        self.name, self.module = name, logger_module(name)
        self.folder, self.title, self.settings = folder, title, dict(settings)
        self.writer: Any = None

    def on_start(self, learner: nn.Module, task: Any) -> None:
        if self.name == "tensorboard":
            self.writer = self.module.SummaryWriter(str(self.folder / "tensorboard"))
        elif self.name == "wandb":
            self.writer = self.module.init(
                project="counterpoint",
                name=self.title,
                dir=str(self.folder),
                config=self.settings,
                id=self.title,
                resume="allow",
            )
        else:
            self.module.set_experiment("counterpoint")
            self.writer = self.module.start_run(run_name=self.title)
            self.module.log_params({key: str(value)[:250] for key, value in self.settings.items()})

    def on_epoch(self, row: dict[str, float]) -> None:
        step = int(row["step"])
        figures = {key: value for key, value in row.items() if key not in ("epoch", "step")}
        if self.name == "tensorboard":
            for key, value in figures.items():
                self.writer.add_scalar(key, value, step)
            self.writer.flush()
        elif self.name == "wandb":
            self.writer.log(figures, step=step)
        else:
            self.module.log_metrics({key.replace("/", "."): value for key, value in figures.items()}, step=step)

    def on_end(self, rows: list[dict[str, float]]) -> None:
        if self.name == "tensorboard":
            self.writer.close()
        elif self.name == "wandb":
            self.writer.finish()
        else:
            self.module.end_run()


class Average:
    """A moving average of a module's weights, to be evaluated and kept in their place.

    Parameters and floating-point buffers are averaged, counters are copied. In the first steps the decay is smaller,
    (1 + step) / (10 + step), so that the random start is soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = module, decay, 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's weights as they are now into the average."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        state = self.module.state_dict()
        if any(name not in self.values or self.values[name].shape != value.shape for name, value in state.items()):
            self.values = {name: value.detach().clone() for name, value in state.items()}  # a stage replaced modules
            return
        floats = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[name] for name in floats], [state[name] for name in floats], 1 - decay)
        for name, value in state.items():
            if not value.is_floating_point():
                self.values[name].copy_(value)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the module's place for a while."""
        own = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.values)
        try:
            yield
        finally:
            self.module.load_state_dict(own)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"steps": self.steps, "values": self.values}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self.steps = int(state["steps"])
        device = next(iter(self.values.values())).device if self.values else torch.device("cpu")
        self.values = {name: value.to(device) for name, value in state["values"].items()}
