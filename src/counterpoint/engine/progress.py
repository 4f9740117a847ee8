"""Show the progress of a fit, and stop it at Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from counterpoint.errors import Interrupted


class Stop:
    """Handle Ctrl-C in a `with` block: the first one sets `asked`, the second one raises Interrupted.

    Args:
        hint: Message of the exception. The fit raises it, too, when the current step is saved.

    Outside the main thread, which alone receives signals, the block changes nothing.
    """

    def __init__(self, hint: str) -> None:
        self.hint, self.asked = hint, False
        self.before: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.asked:
            raise Interrupted(self.hint)
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.before)


class Bar:
    """One progress bar for the whole fit, with the last evaluation's metrics beside it.

    Args:
        title: Title of the bar.
        epochs: Number of epochs of the whole fit.
        console: Console of the bar. None: standard error.
    """

    def __init__(self, title: str, epochs: int, console: Console | None) -> None:
        self.title, self.epochs = title, epochs
        self.progress = Progress(
            # On 80 columns the metrics keep their width: the title is shortened first, then the bar.
            TextColumn("{task.description}", table_column=Column(max_width=20, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console or Console(stderr=True),
            expand=True,
        )
        self.task: Any = None

    def __enter__(self) -> Bar:
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=self.epochs, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def at(self, epochs: float) -> None:
        """Show the number of epochs so far, with a fraction within an epoch."""
        self.progress.update(self.task, completed=epochs)

    def epoch(self, epochs: int, row: Mapping[str, float], stage: str) -> None:
        """Show the end of an epoch: its number, its metrics on `valid`, and the stage's name where there are several."""
        figures = "  ".join(f"{k.partition('/')[2]} {v:.3f}" for k, v in row.items() if k.startswith("valid/"))
        shown: dict[str, Any] = {"figures": f"{stage} {figures}".strip()} if figures or stage else {}
        self.progress.update(self.task, completed=epochs, **shown)
