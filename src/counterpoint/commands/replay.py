"""`counterpoint replay RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import Device, console, say, table


def main(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    device: Device = "cpu",
) -> int:
    """Rerun the training step whose loss was not finite, and show the first modules with infinite or NaN output.

    Training keeps the batch of such a step in the run directory, with the weights and the step's number.

    Example: counterpoint replay runs/first

    Args:
        run: A run directory that keeps a batch.
        device: Device to run the step on: cpu, cuda, cuda:1, mps.
    """
    from counterpoint import training

    found = training.replay(run, device=device)
    turn = f", turn {found.turn + 1}" if found.turn else ""
    say(f"stage {found.stage}, epoch {found.epoch + 1}, step {found.step}{turn}")
    if found.error:
        say(f"error: {found.error}")
    for name, value in found.losses.items():
        say(f"{name:20s} {value:.6g}")
    said = "not finite before the step" if found.weights else "all finite before the step"
    say(f"weights: {said}{': ' if found.weights else ''}{', '.join(found.weights)}")
    say(f"first modules whose output is not finite: {', '.join(found.modules) or 'none; look at the loss'}")
    shown = table(
        "batch", "shape", "lowest", "highest", "mean", "not finite", right=("lowest", "highest", "mean", "not finite")
    )
    for name, row in found.statistics.items():
        numbers = (f"{row[key]:.4g}" if key in row else "-" for key in ("lowest", "highest", "mean"))
        shown.add_row(name, " x ".join(map(str, row["shape"])) or "1", *numbers, f"{row['not_finite']:.2%}")
    console().print(shown)
    if found.finite:
        say("all numbers are finite this time: the run had other versions, another device, or another precision")
    return 0
