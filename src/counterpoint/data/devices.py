"""The device on which data sources compute: their features, and what they generate.

The command that loads a source chooses it (`--device`). It is no option of the source, so a run's record does not name it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CHOSEN: ContextVar[torch.device | None] = ContextVar("the device of data sources", default=None)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Let sources that are loaded inside compute on this device.

    >>> import torch
    >>> with computing_on(torch.device("cpu")):
    ...     chosen_device().type
    'cpu'
    """
    before = _CHOSEN.set(device)
    try:
        yield
    finally:
        _CHOSEN.reset(before)


def chosen_device() -> torch.device:
    """Return the device of `computing_on`. Outside of it: the first GPU, or the CPU where there is none."""
    import torch

    return _CHOSEN.get() or torch.device("cuda" if torch.cuda.is_available() else "cpu")
