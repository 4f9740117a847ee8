"""What a learner may know of its data, and a pass over it without gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.distributed import gather_rows, over
from counterpoint.core.world import processes

Indices = NDArray[np.int64]
BATCH = 256  # of a pass


class Survey:
    """The data as a learner sees it, besides the batches of a step.

    Args:
        task: hands over splits and batches (see the task contract in ARCHITECTURE.md).
        learner: whose device batches are brought to; in evaluation mode for the time of a pass.
    """

    def __init__(self, task: Any, learner: nn.Module) -> None:
        self._task, self._learner = task, learner

    def _device(self) -> torch.device:
        return next((p.device for p in self._learner.parameters()), torch.device("cpu"))

    def split(self, name: str = "train") -> Any:
        """Return a split in the form of the task: "train", "valid", "test", or "unpaired" (None where there is none)."""
        if name == "unpaired":
            return getattr(self._task.data, name, None)
        return self._task.split(name)

    @property
    def rows(self) -> Indices:
        """Positions in the training split that are trained on."""
        rows = getattr(self._task, "rows", None)
        return np.arange(len(self.split())) if rows is None else rows

    @property
    def examples(self) -> int:
        """How many training examples there are."""
        return len(self.split())

    @property
    def batch_size(self) -> int:
        """Examples in a batch, over all processes."""
        return int(self._task.config.batch_size)

    def _numbers(self, name: str) -> Tensor | None:
        found = getattr(self.split(), name, None)
        return None if found is None else torch.from_numpy(np.asarray(found, np.int64))

    @property
    def labels(self) -> Tensor | None:
        """[examples] class numbers, -1 for none; None where nothing is labelled."""
        return self._numbers("labels")

    @property
    def domains(self) -> Tensor | None:
        """[examples] numbers of where examples come from."""
        return self._numbers("domains")

    @property
    def groups(self) -> Tensor | None:
        """[examples] numbers of what examples were cut from."""
        return self._numbers("groups")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(getattr(self._task.data, "classes", None) or ())

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(getattr(self._task.data, "domains", None) or ())

    def batch(self, split: str, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these items of a split as `predict` takes them, on the learner's device."""
        return moved(self._task.evaluation_batch(split, [int(row) for row in rows]), self._device())

    @torch.no_grad()
    def over(self, split: str, function: Callable[[dict[str, Any]], Tensor], rows: Indices | None = None) -> Tensor:
        """Apply a function to every batch of a split, without gradient, in evaluation mode.

        Args:
            split: name of a split.
            function: a batch, as `predict` takes it -> [n, ...].
            rows: positions; default: all, in order.

        Returns [rows, ...] on the CPU, in the order of `rows`. Processes share the work; all of them get the whole.
        """
        rank, size = processes()
        chosen = np.arange(len(self.split(split))) if rows is None else np.asarray(rows, np.int64)
        length = -(-len(chosen) // size)
        mine = chosen[rank * length : (rank + 1) * length]
        training = self._learner.training
        self._learner.eval()
        try:
            most = int(getattr(self._task, "at_once", BATCH))
            parts = [function(self.batch(split, mine[s : s + most])) for s in range(0, len(mine), most)]
            if not parts:  # more processes than items: the shape is that of an item of another's share
                parts = [function(self.batch(split, chosen[:1]))[:0]]
        finally:
            self._learner.train(training)
        with over("world"):
            return gather_rows(torch.cat(parts)).cpu()


def moved(value: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; what is no tensor stays."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(moved(part, device) for part in value)
    return value
