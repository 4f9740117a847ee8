"""Provide the loop's services: callbacks, loggers, a moving average of the weights, early stopping.

The loop's options are in `options.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.engine.learner import Learner
from counterpoint.engine.options import logger_module
from counterpoint.files import replacing

STATES = "loggers.json"  # in a run directory: the run's names at W&B and MLflow


class Callback:
    """The base class of callbacks. Subclasses override the methods that they need.

    Callbacks run in every process. They must not change the learner, nor torch's global random state between steps.

    >>> class Printer(Callback):
    ...     def on_epoch(self, row):
    ...         print(row["epoch"], row["train/loss"])
    """

    def on_start(self, learner: Learner, task: Any) -> None:
        """Run code once, before the first step of a fit, new or resumed. `learner.survey` is set until the fit ends."""

    def on_step(self, learner: Learner, batch: dict[str, Any], losses: Mapping[str, Tensor]) -> None:
        """Run code after each step, with the prepared batch and its losses."""

    def on_epoch(self, row: dict[str, float]) -> None:
        """Run code after each epoch, with its row of metrics. Metrics that it adds to the row are recorded."""

    def on_end(self, rows: list[dict[str, float]]) -> None:
        """Run code once, after the last epoch, when the run's files are written."""

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tensors, numbers, strings, and lists and dictionaries of them."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint. Called after `on_start`."""


def states(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Return the states of the callbacks that have one, by number and class."""
    found = {f"{number} {type(one).__name__}": one.state() for number, one in enumerate(callbacks)}
    return {name: state for name, state in found.items() if state}


def restore_states(callbacks: Sequence[Callback], held: Mapping[str, Any]) -> None:
    """Restore the callbacks' states from a checkpoint. A callback without a state there starts from its beginning."""
    for number, one in enumerate(callbacks):
        state = held.get(f"{number} {type(one).__name__}")
        if state is not None:
            one.resume(state)


class Logged(Callback):
    """A callback that sends each epoch's metrics to TensorBoard, W&B or MLflow. A resumed run continues its curves.

    Args:
        name: One of `LOGGERS`.
        folder: The run directory. TensorBoard writes below it; `loggers.json` in it names the run for the others.
        title: Name of the run.
        settings: Settings to show beside the curves.
    """

    def __init__(self, name: str, folder: Path, title: str, settings: Mapping[str, Any]) -> None:
        self.name, self.module = name, logger_module(name)
        self.folder, self.title, self.settings = folder, title, _flat(settings)
        self.writer: Any = None

    def on_start(self, learner: Learner, task: Any) -> None:
        known = self._known()
        if self.name == "tensorboard":
            # Hide what was written after the checkpoint from which the run resumes.
            self.writer = self.module.SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=learner.position.all_steps + 1
            )
        elif self.name == "wandb":
            if known is None:
                known = secrets.token_hex(8)
                self._keep(known)
            self.writer = self.module.init(
                project="counterpoint",
                name=self.title,
                dir=str(self.folder),
                config=self.settings,
                id=known,
                resume="allow",
            )
        elif known is None:
            self.module.set_experiment("counterpoint")
            self.writer = self.module.start_run(run_name=self.title)
            self._keep(self.writer.info.run_id)
            self.module.log_params({key: str(value)[:250] for key, value in self.settings.items()})
        else:
            self.module.set_experiment("counterpoint")
            self.writer = self.module.start_run(run_id=known)

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

    def close(self) -> None:
        """Close the logger, at the end of the fit or where it was interrupted."""
        if self.writer is None:
            return
        if self.name == "tensorboard":
            self.writer.close()
        elif self.name == "wandb":
            self.writer.finish()
        else:
            self.module.end_run()
        self.writer = None

    def _all(self) -> dict[str, str]:
        path = self.folder / STATES
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except (ValueError, TypeError):
            return {}  # the logger starts new curves; training is not affected

    def _known(self) -> str | None:
        return self._all().get(self.name)

    def _keep(self, known: str) -> None:
        with replacing(self.folder / STATES) as file:
            file.write(json.dumps(self._all() | {self.name: known}).encode())


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten nested settings. The names of a part's settings become dotted."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


class Average:
    """A moving average of a learner's weights, which is evaluated and kept instead of the weights.

    Trained parameters and the running statistics of batch normalisation are averaged. All else is copied: frozen networks,
    moving averages that the learner makes itself, queues, counters. In the first steps the decay is smaller:
    (1 + step) / (10 + step). Therefore the random initial weights soon lose their influence.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = module, decay, 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the module's current weights to the average."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        state = self.module.state_dict()
        if self.values.keys() != state.keys() or any(self.values[n].shape != v.shape for n, v in state.items()):
            self.values = {name: value.detach().clone() for name, value in state.items()}  # modules were replaced
            return
        learning = {name for name, p in self.module.named_parameters() if p.requires_grad}
        averaged, copied = list[str](), list[str]()
        for name, value in state.items():
            statistic = name.endswith(("running_mean", "running_var"))
            (averaged if value.is_floating_point() and (name in learning or statistic) else copied).append(name)
        torch._foreach_lerp_([self.values[n] for n in averaged], [state[n] for n in averaged], 1 - decay)
        for name in copied:
            self.values[name].copy_(state[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Load the average into the module within the block; restore the module's own weights afterwards."""
        own = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.values)
        try:
            yield
        finally:
            self.module.load_state_dict(own)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"steps": self.steps, "values": self.values}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.steps = int(state["steps"])
        device = next(iter(self.values.values())).device if self.values else torch.device("cpu")
        self.values = {name: value.to(device) for name, value in state["values"].items()}


class EarlyStopping:
    """Keep the weights of the best evaluation on `valid`, and stop after a number of evaluations without a better one.

    Args:
        patience: That number; 0 never stops and keeps no weights.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best: dict[str, Any] = {}  # best value, its weights, number of evaluations since

    def judge(self, value: float, weights: Callable[[], dict[str, Tensor]]) -> None:
        """Compare the value of an evaluation with the best one. Keep `weights()` where it is better.

        Args:
            value: The metric, higher is better.
            weights: Returns a copy of the weights by name.
        """
        if not self.best or value > self.best["value"] or math.isnan(self.best["value"]):
            self.best = {"value": value, "weights": weights(), "since": 0}
        else:
            self.best["since"] += 1

    @property
    def over(self) -> bool:
        """Whether the fit ends here."""
        return bool(self.patience and self.best and self.best["since"] >= self.patience)
