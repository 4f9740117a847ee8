"""Define the options of the training loop: precision, device, large batches, averages, early stopping, loggers.

The command line shows them, so this file imports no torch until a method needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from counterpoint.errors import CounterpointError, unknown

if TYPE_CHECKING:
    import torch

Precision = Literal["32", "bf16", "16"]
LOGGERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class Loop:
    """Options of training that do not belong to a system. The defaults are plain float32 training on the whole batch."""

    precision: Precision = "32"
    """Precision of the forward pass: 32 (float32), bf16 or 16 (mixed; 16 scales the loss). Weights, losses and evaluation
    stay in float32."""
    device: str = "auto"
    """Device to train on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps. With several processes use cuda: each takes
    its own GPU."""
    accumulate: int = 1
    """Run the networks on N parts of each batch, one after another, to save memory; at least 1. The loss sees the whole
    batch, so results equal those of N = 1, up to dropout. An error where a network has batch statistics."""
    compile: bool = False
    """Compile the networks with torch.compile for training: a slow first step, then faster ones."""
    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999; below 1. The run evaluates and keeps the average. 0: none."""
    patience: int = 0
    """Stop after this many evaluations on `valid` without a better headline metric, and keep the best weights. 0: never."""
    fsdp: bool = False
    """Divide large networks among the processes of torchrun (PyTorch's FSDP), so that none holds all of them. An error for
    systems that cannot be trained so."""
    log: tuple[str, ...] = ()
    """Loggers besides metrics.csv: tensorboard, wandb, mlflow (each must be installed)."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints within an epoch. The end of an epoch is always saved."""

    def __post_init__(self) -> None:
        if self.precision not in ("32", "bf16", "16"):
            raise unknown("precision", self.precision, ["32", "bf16", "16"])
        if self.accumulate < 1:
            raise CounterpointError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.patience < 0:
            raise CounterpointError(f"patience must not be negative, got {self.patience}")
        if not self.checkpoint_minutes >= 0:
            raise CounterpointError(f"checkpoint_minutes must not be negative, got {self.checkpoint_minutes}")
        if not 0 <= self.ema < 1:
            raise CounterpointError(f"ema must be at least 0 and below 1, got {self.ema}")
        object.__setattr__(self, "log", tuple(dict.fromkeys(self.log)))
        for name in self.log:
            if name not in LOGGERS:
                raise unknown("logger", name, LOGGERS)

    def check(self) -> None:
        """Raise CounterpointError for a device, precision or logger that this machine lacks. Call it before reading data."""
        import torch

        device = self.on()
        if self.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise CounterpointError("--precision bf16: this GPU has no bf16; use --precision 16 or 32")
        if self.precision != "32" and device.type == "mps":
            raise CounterpointError(
                f"--precision {self.precision}: on mps only float32 is supported; use --precision 32"
            )
        if self.compile and device.type == "cpu" and not any(map(shutil.which, _compilers())):
            raise CounterpointError(
                "--compile needs a C++ compiler (g++ or clang++) on the PATH; install one, or leave out --compile"
            )
        for name in self.log:
            logger_module(name)

    def on(self) -> torch.device:
        """Return the device of this process. CounterpointError when this machine lacks it."""
        import torch

        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
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
            if device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise CounterpointError(
                    f"--device {self.device}: several processes cannot share a GPU; use --device cuda"
                )
            number = local_rank if device.index is None else device.index
            if number >= count:
                raise CounterpointError(
                    f"--device {self.device}: this machine has {count} CUDA devices; use --device cpu"
                )
            return torch.device("cuda", number)
        if device.type == "cpu":
            return torch.device("cpu")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise CounterpointError("--device mps: this machine has none; use --device cpu")
        return device

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass in this precision."""
        import torch

        if self.precision == "32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)


def _compilers() -> tuple[str, ...]:
    return os.environ.get("CXX", "g++"), "g++", "clang++", "cl"


def logger_module(name: str) -> Any:
    """Import a logger's package. CounterpointError, naming the package, when it is missing."""
    needed = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}[name]
    try:
        return importlib.import_module(needed)
    except ImportError as error:
        raise CounterpointError(f"--log {name} needs the package {needed}: pip install {needed}") from error
