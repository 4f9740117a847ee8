"""What a user of a training loop asks of it, whatever is trained: precision, device, large batches, averages, early stopping.

`Loop` holds the options. Callbacks and loggers see each epoch's figures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint.errors import CounterpointError, unknown

Precision = Literal["32", "bf16", "16"]
LOGGERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class Loop:
    """How a learner is trained, apart from its own settings. The defaults change nothing."""

    precision: Precision = "32"
    """Numbers of the forward pass: 32 (float32), bf16 or 16 (mixed; 16 scales the loss). Weights stay float32."""
    device: str = "auto"
    """Where to train: auto (the GPU if there is one), cpu, cuda, cuda:1, mps."""
    accumulate: int = 1
    """Cut each batch into N parts to save memory. The loss still sees the whole batch: results equal those of N = 1, up to
    dropout. Refused where a network has batch statistics."""
    compile: bool = False
    """Compile the networks with torch.compile: a slow first step, then faster ones."""
    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999. It is what is evaluated and kept. 0: none."""
    patience: int = 0
    """Stop after so many evaluations on `valid` without a better headline measure, and keep the best weights. 0: never."""
    log: tuple[str, ...] = ()
    """Loggers besides metrics.csv: tensorboard, wandb, mlflow (each must be installed)."""
    checkpoint_minutes: float = 10.0
    """How often to save within an epoch. The end of an epoch is always saved."""

    def __post_init__(self) -> None:
        if self.precision not in ("32", "bf16", "16"):
            raise unknown("precision", self.precision, ["32", "bf16", "16"])
        if self.accumulate < 1 or self.patience < 0:
            raise CounterpointError("accumulate must be at least 1, patience must not be negative")
        if not 0 <= self.ema < 1:
            raise CounterpointError(f"ema must lie in 0..1, 1 not included, got {self.ema}")
        for name in self.log:
            if name not in LOGGERS:
                raise unknown("logger", name, LOGGERS)

    def check(self) -> None:
        """Raise CounterpointError for a device, a precision or a logger that this machine lacks. Call it before data are read."""
        device = self.on()
        if self.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise CounterpointError("this GPU has no bf16; use --precision 16 or 32")
        if self.precision != "32" and device.type == "mps":
            raise CounterpointError("mps trains in float32 here; use --precision 32")
        for name in self.log:
            logger_module(name)

    def on(self, local_rank: int = 0) -> torch.device:
        """Return the device of this process; CounterpointError where there is none of that name."""
        if self.device == "auto":
            return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise unknown("device", self.device, ["auto", "cpu", "cuda", "mps"]) from error
        if device.type not in ("cpu", "cuda", "mps"):
            raise unknown("device", self.device, ["auto", "cpu", "cuda", "mps"])
        if device.type == "cuda":
            count = torch.cuda.device_count()
            number = local_rank if device.index is None else device.index
            if number >= count:
                raise CounterpointError(
                    f"--device {self.device}: this machine has {count} CUDA devices; use --device cpu"
                )
            return torch.device("cuda", number)
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise CounterpointError("--device mps: this machine has none; use --device cpu")
        return device

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass in this precision."""
        if self.precision == "32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)


def logger_module(name: str) -> Any:
    """Import what a logger needs; CounterpointError that names the package where it is missing."""
    import importlib

    needed = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}[name]
    try:
        return importlib.import_module(needed)
    except ImportError as error:
        raise CounterpointError(f"--log {name} needs the package {needed}: pip install {needed}") from error


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
