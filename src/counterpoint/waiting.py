"""Show how far a long loop has come."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")


def patient_track(steps: Iterable[T], what: str, total: int | None = None, *, patience: float = 2.0) -> Iterator[T]:
    """Iterate over steps. When they take longer than `patience` seconds, show a bar on standard error.

    Where standard error is no terminal, one line after five times `patience` replaces the bar. Of several processes, the first
    alone shows it.

    Args:
        steps: The steps, each of which is taken when it is due.
        what: The text beside the bar.
        total: Number of steps. Default: the length of `steps`.
        patience: Time before the bar appears, in seconds, >= 0.

    >>> list(patient_track([1, 2, 3], "counting"))
    [1, 2, 3]
    """
    if total is None and isinstance(steps, Sized):
        total = len(steps)
    if os.environ.get("RANK", "0") != "0":
        yield from steps
        return
    started, told = time.monotonic(), False
    bar: Any = None
    try:
        for done, step in enumerate(steps):
            waited = time.monotonic() - started
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
            elif not told and waited >= patience:
                from rich.console import Console
                from rich.progress import Progress

                console = Console(stderr=True)
                if console.is_terminal:
                    bar = Progress(console=console, transient=True)
                    bar.add_task(what, total=total, completed=done)
                    bar.start()
                elif waited >= 5 * patience:
                    of = "" if total is None else f" of {total:,}"
                    console.print(f"{what}: {done:,}{of} after {waited:.0f} seconds", highlight=False, soft_wrap=True)
                    told = True
            yield step
    finally:
        if bar is not None:
            bar.stop()
