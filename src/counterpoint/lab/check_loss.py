"""Test anybody's loss for faults that training hides, most of all a wrong gradient over several processes.

`check_loss` is the function of `counterpoint check-loss`. Its checks are listed in `names`; `loss_checks/` makes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from counterpoint.errors import CounterpointError, unknown
from counterpoint.lab.loss_checks import processes, single
from counterpoint.lab.loss_checks.given import Given, versions_of
from counterpoint.lab.loss_checks.inputs import parse
from counterpoint.lab.loss_checks.processes import Crew
from counterpoint.lab.loss_checks.report import Check, Report
from counterpoint.lab.loss_checks.single import Subject

__all__ = ["Check", "Crew", "Report", "check_loss", "names"]


def names(worlds: Sequence[int] = (2, 3)) -> list[str]:
    """Return the names of all checks in order.

    A check over processes compares value and gradient; its name here is that of both together, such as "2 processes".
    """
    return [*single.CHECKS, *(f"{world} processes{kind}" for kind in ("", ", uneven") for world in worlds)]


def check_loss(
    loss: str | Callable[..., Any],
    *,
    settings: Mapping[str, Any] | None = None,
    inputs: str = "n d, n d",
    output: str | None = None,
    size: int = 32,
    dim: int = 16,
    normalize: bool = False,
    worlds: Sequence[int] = (2, 3),
    skip: Sequence[str] = (),
    crew: Crew | None = None,
    console: Console | None = None,
) -> Report:
    """Test a loss: number types, hard rows, a batch of one, second derivatives, memory, several processes against one.

    Args:
        loss: "module:name" or "file.py:name" of a function or class, or a callable that can be pickled. An nn.Module is
            copied for each call.
        settings: Arguments of a class's constructor, or keyword arguments of a function. The texts "{rank}" and "{world}"
            stand for the number of the process, from 0, and of all processes. Default: none.
        inputs: Description of the inputs, separated by commas; n stands for `size`, d for `dim`. "n d" is a batch of rows,
            "2n d" one with two views of each item, "n d:fixed" rows without gradient, "n:int" labels, "10.0" a learnt
            number. "NAME=" before an input passes it by name.
        output: Key, index or attribute of the loss in what a call returns. Default: the call returns the loss, or a mapping
            with the key "loss".
        size: Items of a process's batch, at least 4.
        dim: Width of a row, at least 1.
        normalize: Rows have length 1. Checks with zero or huge rows are then not applicable.
        worlds: Numbers of processes, each at least 2. Empty: one process only.
        skip: Names of checks to leave out; see `names`.
        crew: Running processes, to check several losses with. Default: started and ended here.
        console: Console of the progress bar. Default: standard error.

    Each check compares the loss and its gradients with the same loss in float64, or with one process.
    The largest relative error that holds is 1e-6 in float64, 1e-3 in float32, 0.02 in float16 and 0.1 in bfloat16.

    Raises CounterpointError for a loss that cannot be imported, constructed or called on such inputs.

    >>> report = check_loss("torch.nn:MSELoss", worlds=(), skip=["memory"])
    >>> report.holds, report["batch of one"].verdict
    (True, 'holds')
    """
    if size < 4 or dim < 1:
        raise CounterpointError("--size must be at least 4 and --dim at least 1")
    if any(world < 2 for world in worlds):
        raise CounterpointError("--processes must be 2 or more; name none to check one process only")
    known = names(worlds)
    for name in skip:
        if name not in known:
            raise unknown("check", name, known)
    started = time.monotonic()
    given = Given(loss, dict(settings or {}), output)
    found = given.found()
    subject = Subject(given, parse(inputs, dim), size, normalize)
    todo = [name for name in known if name not in skip]
    checks: list[Check] = []
    preload = [loss.partition(":")[0]] if isinstance(loss, str) and ".py:" not in loss else []
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("checks"),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
        transient=True,
    )
    with progress, nullcontext(crew) if crew else Crew(max(worlds, default=2), preload) as team:
        bar = progress.add_task("ordinary rows", total=len(todo))
        subject.ordinary  # raises where the loss cannot be called  # noqa: B018
        for name in todo:
            progress.update(bar, description=name)
            if name in single.CHECKS:
                checks.append(single.check(subject, name))
            else:
                world = int(name.partition(" ")[0])
                checks += processes.check(subject, team, world, uneven=name.endswith("uneven"))
            progress.advance(bar)
    return Report(
        loss
        if isinstance(loss, str)
        else f"{type(loss).__module__}:{getattr(loss, '__qualname__', type(loss).__name__)}",
        dict(given.settings),
        inputs,
        size,
        dim,
        normalize,
        str(subject.reference).removeprefix("torch."),
        tuple(checks),
        versions_of(found),
        round(time.monotonic() - started, 1),
    )
