"""Import a loss by name, construct it, call it on a batch and take its gradients."""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.core.seeds import seed_torch
from counterpoint.errors import CounterpointError, unknown
from counterpoint.lab.loss_checks.inputs import Item

RANK, WORLD = "{rank}", "{world}"  # in settings: the number of this process and of all processes


class NoScalar(Exception):
    """The loss returned something else than one number. The message names it."""


def read_settings(words: Sequence[str]) -> dict[str, Any]:
    """Read settings of the form NAME=VALUE. A value is a Python literal, true, false, none, or else a text.

    >>> read_settings(["temperature=0.1", "gather_distributed=true", "group=world", "rank={rank}"])
    {'temperature': 0.1, 'gather_distributed': True, 'group': 'world', 'rank': '{rank}'}
    """
    known = {"true": True, "false": False, "none": None}
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise CounterpointError(f"--set needs NAME=VALUE, got '{word}'")
        try:
            value = known[text.lower()] if text.lower() in known else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        found[name] = value
    return found


@dataclass(frozen=True)
class Outcome:
    """A loss and its gradients."""

    value: Tensor
    """The loss, a number without gradient."""
    rows: list[Tensor | None]
    """Gradient of each input; zero where the loss ignores it; None for labels, fixed rows and learnt numbers."""
    learnt: dict[str, Tensor]
    """Gradients of learnt numbers and of the module's parameters, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the loss and all gradients by name."""
        rows = {f"the gradient of input {number}": g for number, g in enumerate(self.rows, 1) if g is not None}
        return {"the loss": self.value, **rows, **{f"the gradient of {name}": g for name, g in self.learnt.items()}}


@dataclass(frozen=True)
class Given:
    """A loss under test, as a description that another process can read.

    Args:
        loss: "module:name" or "file.py:name", or a callable or nn.Module that can be pickled.
        settings: Arguments of the constructor of a class, or keyword arguments of each call of a function. The texts
            "{rank}" and "{world}" stand for the number of the process and of all processes.
        output: Key, index or attribute of the loss in what a call returns. None: the call returns the loss, or a mapping with
            the key "loss".
    """

    loss: str | Callable[..., Any]
    settings: Mapping[str, Any]
    output: str | None = None

    def found(self) -> Any:
        """Import and return the object that `loss` names."""
        return imported(self.loss) if isinstance(self.loss, str) else self.loss

    def make(self, rank: int = 0, world: int = 1) -> Callable[..., Any]:
        """Construct a new loss, without state of earlier calls."""
        place = {RANK: rank, WORLD: world}
        settings = {k: place.get(v, v) if isinstance(v, str) else v for k, v in self.settings.items()}
        found = self.found()
        seed_torch(0)
        if isinstance(found, type):
            return found(**settings)
        if isinstance(found, nn.Module):
            if settings:
                raise CounterpointError("settings are for a class or a function; this loss is an object")
            return copy.deepcopy(found)
        return functools.partial(found, **settings) if settings else found

    def call(self, made: Callable[..., Any], items: Sequence[Item], tensors: Sequence[Tensor]) -> Tensor:
        """Call a loss on its inputs and return the loss, a tensor of one number."""
        seed_torch(1)
        by_name = {item.name: tensor for item, tensor in zip(items, tensors, strict=True) if item.name}
        result = made(*(t for item, t in zip(items, tensors, strict=True) if not item.name), **by_name)
        return picked(result, self.output)

    def evaluate(
        self,
        items: Sequence[Item],
        batch: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        rank: int = 0,
        world: int = 1,
        autocast: torch.dtype | None = None,
    ) -> Outcome:
        """Construct the loss, call it once on a batch and take all gradients.

        Args:
            items: Descriptions of the inputs.
            batch: Their values, in float64 or int64.
            dtype: Number type of rows, learnt numbers and parameters.
            rank: The number of this process.
            world: The number of processes.
            autocast: Number type of `torch.autocast` around the forward pass. None: no autocast.
        """
        made = self.make(rank, world)
        if isinstance(made, nn.Module):
            made = made.to(dtype)
        leaves = leaves_of(items, batch, dtype)
        with torch.autocast("cpu", autocast) if autocast is not None else nullcontext():
            value = self.call(made, items, leaves)
        parameters = dict(made.named_parameters()) if isinstance(made, nn.Module) else {}
        sources = [leaf for leaf in leaves if leaf.requires_grad] + [p for p in parameters.values() if p.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(sources)
        if value.requires_grad:
            found = torch.autograd.grad(value, sources, allow_unused=True)
        gradients = {
            id(source): torch.zeros_like(source) if gradient is None else gradient.detach()
            for source, gradient in zip(sources, found, strict=True)
        }
        rows = [gradients[id(leaf)] if item.kind == "rows" else None for item, leaf in zip(items, leaves, strict=True)]
        learnt = {
            item.name or f"number {number}": gradients[id(leaf)]
            for number, (item, leaf) in enumerate(zip(items, leaves, strict=True), 1)
            if item.kind == "scalar"
        }
        learnt |= {name: gradients[id(p)] for name, p in parameters.items() if p.requires_grad}
        return Outcome(value.detach(), rows, learnt)


def leaves_of(items: Sequence[Item], batch: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copy a batch in a number type. Rows and learnt numbers require a gradient."""
    copies = []
    for item, tensor in zip(items, batch, strict=True):
        leaf = tensor.clone() if item.kind == "labels" else tensor.to(dtype, copy=True)
        copies.append(leaf.requires_grad_(item.kind in ("rows", "scalar")))
    return copies


def picked(result: Any, output: str | None) -> Tensor:
    """Return the loss in the result of a call, a tensor of one number.

    Raises NoScalar where there is none, with the names that `output` may have.
    """
    names: list[str] = []
    if isinstance(result, Mapping):
        names = [str(key) for key in result]
    elif isinstance(result, tuple | list):
        names = [str(number) for number in range(len(result))]
    if output is not None:
        if names and output not in names:
            raise NoScalar(f"the loss returns no '{output}'; it returns: {', '.join(names)}")
        if isinstance(result, Mapping):
            result = {str(key): value for key, value in result.items()}[output]
        elif names:
            result = result[int(output)]
        elif hasattr(result, output):
            result = getattr(result, output)
        else:
            raise NoScalar(f"the loss returns a {type(result).__name__} without '{output}'")
    elif names:
        key = "loss" if "loss" in names else names[0] if len(names) == 1 else None
        if key is None:
            raise NoScalar(f"the loss returns several values; choose one with --output: {', '.join(names)}")
        return picked(result, key)
    if not isinstance(result, Tensor):
        raise NoScalar(f"the loss returns a {type(result).__name__}, not a tensor")
    if result.numel() != 1:
        raise NoScalar(f"the loss returns a tensor of shape {list(result.shape)}, not one number")
    return result.reshape(())


def imported(name: str) -> Any:
    """Import "module:name" or "file.py:name"; the name may have dots.

    Raises CounterpointError that names the part that is missing.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise CounterpointError(f"name the loss as module:name or file.py:name, got '{name}'")
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = [known for known in dir(found) if not known.startswith("_")]
            raise unknown(f"name in {place}", part, near)
        found = getattr(found, part)
    if not callable(found):
        raise CounterpointError(f"{name} is a {type(found).__name__}, which cannot be called")
    return found


def _module(name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise CounterpointError(f"cannot import {name}: {error}; install its package or correct the name") from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise CounterpointError(f"{path}: no such file")
    path = path.resolve()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def versions_of(found: Any) -> dict[str, str]:
    """Return the versions of Python, torch and the distribution that an object's module belongs to."""
    said = {"python": platform.python_version(), "torch": str(torch.__version__)}
    top = str(getattr(found, "__module__", "")).partition(".")[0]
    for distribution in _distributions().get(top, ()):
        said[distribution] = importlib.metadata.version(distribution)
    return said


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Return the installed distributions of each package; reading them takes up to seconds."""
    return importlib.metadata.packages_distributions()
