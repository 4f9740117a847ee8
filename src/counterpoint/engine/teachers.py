"""Provide teachers: networks that do not learn. `frozen` makes one, `cached` stores its outputs for a split.

A frozen network is no submodule of the learner: no optimiser has its parameters, it has no gradient, and a run does not keep
its weights. Checkpoints identify it by the digest of its weights. They hold the weights of a snapshot, which has no other
source.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.distributed import global_max
from counterpoint.data import cached as cache
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, RunError
from counterpoint.files import replacing


class Frozen:
    """A network in evaluation mode whose outputs carry no gradient.

    Args:
        module: The network. Its parameters no longer require gradients.
        source: Source of the network, such as "run:runs/x"; "" for a snapshot, whose weights checkpoints keep.
        call: Function that `frozen(...)` computes. Default: the module's forward.
        width: Width of the rows that the learner can use. Default: any.
    """

    def __init__(
        self, module: nn.Module, source: str = "", call: Callable[..., Any] | None = None, width: int | None = None
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.source, self.width, self._call = source, width, call or module

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            found = self._call(*arguments, **named)
        if isinstance(found, Tensor):
            need_width(self, found.shape[-1] if found.ndim else 0)
        return found

    def to(self, device: torch.device) -> Frozen:
        """Move the network to a device; return the same object."""
        self.module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next((t.device for t in [*self.module.parameters(), *self.module.buffers()]), torch.device("cpu"))

    @property
    def function(self) -> str:
        """The name of the computed function, without the weights."""
        call = self._call.func if isinstance(self._call, partial) else self._call
        return str(getattr(call, "__qualname__", type(call).__qualname__))

    def digest(self) -> str:
        """Return the SHA-256 of the network's weights."""
        found = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            found.update(name.encode())
            found.update(
                value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            )
        return found.hexdigest()

    def state(self) -> dict[str, Any]:
        """Return the teacher's state for a checkpoint."""
        weights = {} if self.source else self.module.state_dict()
        return {"source": self.source, "digest": self.digest(), "weights": weights}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint. RunError when the teacher has changed since."""
        if not self.source:
            self.module.load_state_dict(state["weights"])
        if self.digest() != state["digest"]:
            raise RunError(
                f"the teacher {self.source} has other weights than when this run began; restore them, or start a new run"
            )


def need_width(teacher: Frozen, found: int) -> None:
    """Raise CounterpointError when the width of a teacher's rows, `found`, is not the width that the learner needs."""
    if teacher.width not in (None, found):
        raise CounterpointError(
            f"the teacher {teacher.source or type(teacher.module).__name__} gives rows {found} wide, and this student "
            f"compares rows {teacher.width} wide: choose a teacher of that width, or set the student's width to {found}"
        )


def snapshot(module: nn.Module) -> Frozen:
    """Return a frozen copy of a network with its current weights."""
    return Frozen(copy.deepcopy(module))


def frozen(
    teacher: str | nn.Module,
    call: Callable[[nn.Module], Callable[..., Any]] | None = None,
    *,
    width: int | None = None,
    size: int = 224,
) -> Frozen:
    """Make a teacher.

    Args:
        teacher: A network, which is copied, or the name of one:
            "run:RUN"            the learner of a finished run;
            "fit:SLUG?data=SOURCE&OPTION=VALUE"   a small teacher that is trained once and kept in the cache, by its settings
                                 and the package's version (`seed=N` among the options; default 0);
            "hf:NAME" or another name of an image encoder, with its published weights, as `encoders.images` takes it.
        call: Maps the network to the function to call. Default: the network's forward, or a learner's `predict`.
        width: Width of the rows that the student compares. Rows of another width raise at the first call. Default: any.
        size: Height and width of the images for an image encoder, in pixels.

    Raises CounterpointError for a name of none of these kinds, RunError for a run that is missing or not finished.
    """
    if isinstance(teacher, nn.Module):
        copied = copy.deepcopy(teacher)
        return Frozen(copied, "", call(copied) if call else None, width)
    kind, _, rest = teacher.partition(":")
    if kind in ("run", "fit"):
        # Import by name, as the catalogue does: the modules that load and train learners are above this package.
        room = importlib.import_module("counterpoint.experiment")
        module: Any = room.load_learner(rest) if kind == "run" else room.fitted(rest)
        return Frozen(module, teacher, call(module) if call else module.predict, width)
    if kind in ("hf", "timm", "torchvision"):
        encoders = importlib.import_module("counterpoint.encoders.images")
        module = encoders.build_image_encoder(teacher, size, pretrained=True)
        return Frozen(module, teacher, call(module) if call else None, width)
    raise CounterpointError(
        f"unknown teacher '{teacher}': give run:RUN, fit:SLUG?data=SOURCE, hf:NAME, timm:NAME or torchvision:NAME"
    )


def parameters(*modules: nn.Module) -> int:
    """Return the number of parameters of networks; those that several share count once."""
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


_OF_MODULES = frozenset(vars(nn.Module()))  # what every module has: parameters, buffers, parts, hooks


def teachers_of(module: nn.Module) -> dict[str, Frozen]:
    """Return the frozen networks of a learner and its parts, by place: attributes, and items of lists and dicts."""
    found: dict[str, Frozen] = {}
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if name in _OF_MODULES:
                continue
            if isinstance(value, Frozen):
                found[f"{prefix}.{name}".lstrip(".")] = value
            elif isinstance(value, dict | list | tuple):
                for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                    if isinstance(each, Frozen):
                        found[f"{prefix}.{name}.{key}".lstrip(".")] = each
    return found


class Cached:
    """A teacher's outputs for the items of a split, by position: `cached[index]` is [n, dim] on the index's device."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Tensor) -> Tensor:
        rows = np.asarray(self.values[index.detach().cpu().numpy()])
        return torch.from_numpy(rows).to(index.device)


def cached(teacher: Frozen, survey: Survey, split: str, output: str = "feature") -> Cached:
    """Compute a teacher's outputs for every item of a split, once, and keep them on disk.

    Args:
        teacher: The teacher. It receives evaluation batches.
        survey: The survey of the student.
        split: "train", "valid" or "test".
        output: Name of the output, for a teacher with several named outputs.

    The file's key has the teacher's weights and function, the split's length and a digest of 64 of its items. It also has what
    tells all items apart (`_origins`). After a change of any of these the rows are computed again.
    """

    def row(batch: dict[str, Any]) -> Tensor:
        found = teacher(batch)
        value = found[output] if isinstance(found, Mapping) else found
        rows = value.detach().float().reshape(len(value), -1)
        need_width(teacher, rows.shape[1])
        return rows

    count = len(survey.split(split))
    some = survey.batch(split, np.unique(np.linspace(0, count - 1, min(count, 64)).astype(np.int64)))
    items = [value.detach().cpu().contiguous().numpy() for value in _tensors(some)]
    key = (teacher.digest(), teacher.function, split, count, output, *items)
    key += tuple(_origins(survey.split(split), survey.modalities))
    path = cache.place("teachers", *key, suffix=".npy")
    # One process may find the file that another has just written; either all processes compute, or none. Within
    # `core.world.alone()`, as in `Learner.figures`, no other process takes part.
    if global_max(int(_rows(path, count) is None), teacher.device):
        computed = survey.over(split, row)  # every process takes its share
        with cache.locked(path):
            if _rows(path, count) is None:
                with replacing(path) as file:
                    np.save(file, computed.numpy())
    values = _rows(path, count)
    if values is None:
        raise RunError(f"{path} was written but cannot be read; free disk space, or keep the cache from being cleared")
    need_width(teacher, values.shape[1])
    return Cached(values)


def _origins(split: Any, modalities: Sequence[str]) -> list[Any]:
    """Return what tells the items of a split apart without reading them all.

    These are their labels, names and files with size and time, and of pictures in memory the pixels.
    """
    arrays = [getattr(split, name, None) for name in ("labels", "pixels")]
    found: list[Any] = [values for values in arrays if isinstance(values, np.ndarray)]
    if not hasattr(split, "row_names"):
        return found
    at = np.arange(len(split))
    found.append("\n".join(split.row_names(at)))
    files: Any = getattr(split, "files", lambda at, name: [])
    for path in sorted({path for name in modalities for path in files(at, name) if path}):
        with suppress(OSError):
            known = os.stat(path)
            found.append(f"{path} {known.st_size} {known.st_mtime_ns}")
    return found


def _rows(path: Path, count: int) -> NDArray[np.float32] | None:
    """Map a teacher's rows into memory. None where the file is missing, damaged or of another length."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # damaged in any way
        return None
    return found if found.ndim == 2 and len(found) == count else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for key in sorted(value) for t in _tensors(value[key])]
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []
