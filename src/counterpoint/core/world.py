"""Which processes there are, and over which of them a loss is taken."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch.distributed as dist

# None: this process alone, or whatever an enclosing `over` says. "world": all processes of the job.
Group: TypeAlias = "dist.ProcessGroup | Literal['world'] | None"
F = TypeVar("F", bound=Callable[..., Any])

_group: ContextVar[Group] = ContextVar("counterpoint_group", default=None)


def processes() -> tuple[int, int]:
    """Return (rank, number of processes) of the job, whatever losses are taken over; (0, 1) when not distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave() -> None:
    """End the process group of this job.

    The pause is for PyTorch 2.6. Its end of a group holds Python's lock while it waits for Gloo's thread. That thread needs the
    lock to release the tensors of the last exchange, so both would wait for ever.
    """
    time.sleep(0.05)
    dist.destroy_process_group()


def world() -> tuple[int, int]:
    """Return (rank, number of processes) of the group that `over` has put in force; (0, 1) outside of it."""
    group = _group.get()
    if group is None:
        return 0, 1
    if isinstance(group, str):
        return processes()
    return dist.get_rank(group), dist.get_world_size(group)


def process_group() -> dist.ProcessGroup | None:
    """Return the group in force as torch.distributed takes it; None stands there for all processes of the job."""
    group = _group.get()
    return None if isinstance(group, str) else group


@contextmanager
def over(group: Group) -> Iterator[None]:
    """Take losses over the batch of all processes of a group, as long as the context lasts.

    Args:
        group: a ProcessGroup that this process belongs to, or "world": all processes of the job, which is this one alone where
            no process group is initialised. None changes nothing.

    The context holds for this thread. A loss remembers its group for the backward pass, which may run outside of it.
    Raises ValueError for another word and for a group without this process.

    >>> with over("world"):
    ...     world()
    (0, 1)
    """
    if group is None:
        yield
        return
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f"group must be a ProcessGroup or 'world', got {group!r}")
    elif dist.get_rank(group) < 0:
        raise ValueError("group does not hold this process: call the loss on its members only")
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Take losses over this process's batch, also within `over`, as long as the context lasts.

    >>> with over("world"), alone():
    ...     world()
    (0, 1)
    """
    token = _group.set(None)
    try:
        yield
    finally:
        _group.reset(token)


GROUP_HELP = (
    "group: processes whose batches together are the batch: a ProcessGroup, or 'world' for all; see `core.distributed`.\n"
    "    None (default): this process's batch alone."
)


def _explained(doc: str) -> str:
    """Add a line on `group` to the arguments of a docstring, or after its first paragraph where none are listed."""
    before, listed, after = doc.partition("    Args:\n")
    arguments, blank, rest = (after if listed else before).partition("\n\n")
    indent = " " * (8 if listed else 4)
    text = GROUP_HELP.replace("\n", "\n" + indent)
    if listed:
        return f"{before}{listed}{arguments}\n{indent}{text}{blank}{rest}"
    return f"{arguments}\n\n{indent}{text}{blank}{rest}"


def over_group(function: F) -> F:
    """Give a function the keyword `group`: the processes whose batches together are its batch (see `over`).

    Without it the batch is this process's, or that of an enclosing `over`. The docstring gets a line on it.
    """
    own = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, group: Group = None, **kwargs: Any) -> Any:
        if group is None:
            return function(*args, **kwargs)
        with over(group):
            return function(*args, **kwargs)

    parameter = inspect.Parameter("group", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Group")
    run.__doc__ = _explained(function.__doc__ or "")
    found: Any = run
    found.__signature__ = own.replace(parameters=[*own.parameters.values(), parameter])
    return cast(F, found)
