"""Give a learner access to its data outside the batches of a step, and passes over the data without gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.distributed import gather_rows
from counterpoint.core.world import world

Indices = NDArray[np.int64]
BATCH = 256  # items in a batch of a pass


class Survey:
    """A learner's access to its data, besides the batches of a step.

    Args:
        task: Provides splits and batches (see the task contract in ARCHITECTURE.md).
        learner: The learner. Batches are moved to its device; it is in evaluation mode during a pass.
    """

    def __init__(self, task: Any, learner: nn.Module) -> None:
        self._task, self._learner = task, learner

    def _device(self) -> torch.device:
        return next((p.device for p in self._learner.parameters()), torch.device("cpu"))

    @property
    def modalities(self) -> list[str]:
        """Names of the items' modalities; "image" alone for data that name none."""
        return list(getattr(getattr(self._task, "data", None), "modalities", ("image",)))

    def split(self, name: str = "train") -> Any:
        """Return a split in the form of the task: "train", "valid", "test", or "unpaired" (None where there is none)."""
        if name == "unpaired":
            return getattr(self._task.data, name, None)
        return self._task.split(name)

    @property
    def rows(self) -> Indices:
        """Positions in the training split of the items that are trained on."""
        rows = getattr(self._task, "rows", None)
        return np.arange(len(self.split())) if rows is None else rows

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.split())

    @property
    def batch_size(self) -> int:
        """Number of examples in a batch, over all processes."""
        return int(self._task.config.batch_size)

    def _numbers(self, name: str) -> Tensor | None:
        found = getattr(self.split(), name, None)
        return None if found is None else torch.from_numpy(np.asarray(found, np.int64))

    @property
    def labels(self) -> Tensor | None:
        """[examples] class numbers, -1 for an item without a class; None where no item has one."""
        return self._numbers("labels")

    @property
    def domains(self) -> Tensor | None:
        """[examples] numbers of the domains that examples come from; None where there are none."""
        return self._numbers("domains")

    @property
    def groups(self) -> Tensor | None:
        """[examples] numbers of the groups, such as recordings, that examples were taken from; None where there are none."""
        return self._numbers("groups")

    @property
    def tags(self) -> Tensor | None:
        """[examples, tags] 1 where an example has a label of which it may have several, else 0; None without such labels."""
        found = getattr(self._task.data, "tags", None)
        return None if found is None else torch.from_numpy(np.asarray(found.train, np.int64))

    @property
    def texts(self) -> Any:
        """Texts of training examples and classes, as the data have them (`data.images.WebTexts`); None without texts."""
        return getattr(self._task.data, "texts", None)

    @property
    def text_rows(self) -> Indices:
        """Numbers of the plain texts that are trained on; empty where the data have none."""
        found: Indices = getattr(self._task, "text_rows", np.empty(0, np.int64))
        return found

    @property
    def unlabelled(self) -> Any:
        """Further training pictures without labels or chats (`data.images.ImageSplit`); None where the data have none."""
        return getattr(self._task.data, "unlabelled", None)

    def known(self, split: str) -> dict[str, Tensor]:
        """Return what is known of the items of a split besides their class, by name, for measures alone.

        Attributes are class numbers [n], -1 for none. Factors are numbers [n, k]. {} where the data have neither.
        """
        data, at = self._task.data, ("train", "valid", "test").index(split)
        found = getattr(data, "attributes", {}) | getattr(data, "factors", {})
        return {name: torch.from_numpy(np.asarray(of[at])) for name, of in found.items()}

    @property
    def item_features(self) -> dict[str, Tensor]:
        """[items, width] features of all items of histories or sets, by name; {} where the data have none."""
        found = getattr(self._task.data, "features", {})
        return {name: torch.from_numpy(np.asarray(rows, np.float32)) for name, rows in found.items()}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(getattr(self._task.data, "classes", None) or ())

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(getattr(self._task.data, "domains", None) or ())

    def evaluator(self, split: str) -> Any:
        """Return a new evaluator of a split, for a learner that measures itself in several ways."""
        return self._task.evaluator(split)

    def in_batches(self, split: str) -> list[Indices]:
        """Return the positions of all items of a split, in order, batch by batch."""
        most = int(getattr(self._task, "at_once", BATCH))
        every = np.arange(len(self.split(split)))
        return [every[start : start + most] for start in range(0, len(every), most)]

    def batch(self, split: Any, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return the items at these positions as a batch for `predict`, on the learner's device.

        Args:
            split: Name of a split; or a split of the task's form, where the task takes one.
            rows: Positions.
        """
        return moved(self._task.evaluation_batch(split, [int(row) for row in rows]), self._device())

    @torch.no_grad()
    def over(self, split: str, function: Callable[[dict[str, Any]], Tensor], rows: Indices | None = None) -> Tensor:
        """Apply a function to every batch of a split, without gradient, in evaluation mode.

        Args:
            split: Name of a split.
            function: Function from a batch, as `predict` takes it, to [n, ...].
            rows: Positions. Default: all, in order.

        Returns [rows, ...] on the CPU, in the order of `rows`. The processes of a fit share the work, and each receives the whole
        result. Within `core.world.alone()`, as in `Learner.figures`, a process does all of the work.
        """
        rank, size = world()
        chosen = np.arange(len(self.split(split))) if rows is None else np.asarray(rows, np.int64)
        length = -(-len(chosen) // size)
        mine = chosen[rank * length : (rank + 1) * length]
        training = self._learner.training
        self._learner.eval()
        try:
            most = int(getattr(self._task, "at_once", BATCH))
            parts = [function(self.batch(split, mine[s : s + most])) for s in range(0, len(mine), most)]
            if not parts:  # more processes than items: take the shape from an item of another process
                parts = [function(self.batch(split, chosen[:1]))[:0]]
        finally:
            self._learner.train(training)
        return gather_rows(torch.cat(parts)).cpu()


def moved(value: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device. Other values stay the same."""
    return mapped(value, lambda x: x if x.device == device else x.to(device, non_blocking=True))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with a function applied to each of its tensors. Other values stay the same."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
