"""`counterpoint check-loss MODULE:NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import Place, Text, console, say, table, unset


def main(
    loss: Annotated[Positional[str], arg(metavar="MODULE:NAME")],
    *,
    set: Annotated[tuple[str, ...], unset(metavar="NAME=VALUE")] = (),
    inputs: str = "n d, n d",
    output: Annotated[Text, unset(metavar="NAME")] = None,
    size: int = 32,
    dim: int = 16,
    normalize: Annotated[bool, arg(aliases=("--normalise",))] = False,
    processes: Annotated[tuple[int, ...], arg(metavar="INT")] = (2, 3),
    skip: Annotated[tuple[str, ...], unset(metavar="CHECK")] = (),
    json: Annotated[Place, unset(metavar="FILE")] = None,
) -> int:
    """Test a loss: several processes against one, number types, hard rows, second derivatives, memory.

    The exit code is 0 where all checks hold and 1 where one fails or ends in an error. It is 2 for a loss that cannot be called.

    Example: counterpoint check-loss lightly.loss:NTXentLoss --set gather_distributed=true temperature=0.1

    Args:
        loss: A function or class, as `module:name` or `file.py:name`.
        set: Arguments of a constructor or function. `{rank}` and `{world}`: number of the process, and of all. Default: none.
        inputs: The inputs: `n d` rows, `2n d` two views, `n d:fixed` no gradient, `n:int` labels, `10.0` learnt, `NAME=` by name.
        output: Key, index or attribute of the loss in what a call returns. Default: the call returns the loss.
        size: Items of a process's batch (n), at least 4.
        dim: Width of a row (d), at least 1.
        normalize: Draw rows of length 1.
        processes: Numbers of processes, each at least 2.
        skip: Names of checks to leave out, such as "double backward" or "3 processes, uneven". Default: none.
        json: File of the report. Default: none is written.
    """
    import json as encoding

    from counterpoint.files import check_writable, replacing
    from counterpoint.lab.check_loss import check_loss
    from counterpoint.lab.loss_checks.given import read_settings

    where: Path | None = None if json is None else check_writable(json)
    report = check_loss(
        loss,
        settings=read_settings(set),
        inputs=inputs,
        output=output,
        size=size,
        dim=dim,
        normalize=normalize,
        worlds=processes,
        skip=skip,
    )
    shown = table("check", "verdict", "relative error", "found", right=("relative error",), title=loss)
    for check in report.checks:
        number = "" if check.error is None else f"{check.error:.1e}"
        shown.add_row(check.name, check.verdict, number, check.found)
    console().print(shown, markup=False)
    for meaning in dict.fromkeys(check.meaning for check in report.checks if check.verdict in ("fails", "error")):
        of = [check.name for check in report.checks if check.meaning == meaning and check.verdict in ("fails", "error")]
        say(f"{', '.join(of)}: {meaning}")
    if where is not None:
        with replacing(where) as file:
            file.write((encoding.dumps(report.record(), indent=1) + "\n").encode())
        say(f"Report: {where}")
    return 0 if report.holds else 1
