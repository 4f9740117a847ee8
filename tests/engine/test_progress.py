"""The progress bar of a fit, and its end at Ctrl-C."""

from __future__ import annotations

import io
import signal

import pytest
from rich.console import Console

from counterpoint.engine.progress import Bar, Stop
from counterpoint.errors import Interrupted


def test_the_progress_bar_keeps_its_figures_on_80_columns() -> None:
    console = Console(width=80, force_terminal=True, file=io.StringIO())
    bar = Bar("macil-sd-20261128-120000-seed-0", 200, console)
    bar.progress.add_task(
        "macil-sd-20261128-120000-seed-0", total=200, completed=12, figures="av_ap 0.665  visual_ap 0.6"
    )
    with console.capture() as seen:
        console.print(bar.progress.get_renderable())
    assert "av_ap 0.665" in seen.get()
    assert "12/200" in seen.get()


def test_the_first_ctrl_c_is_noted_and_the_second_one_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = Stop("continue it later")
    with stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(Interrupted, match="continue it later"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
