"""`counterpoint analyse RUN --temperature-sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import console, say, table, unset
from counterpoint.errors import CounterpointError


def main(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    temperature_sweep: bool = False,
    temperatures: Annotated[tuple[float, ...], unset(metavar="T T [T ...]")] = (),
    seeds: int = 1,
    jobs: int = 2,
) -> int:
    """Measure the effect of a trained run's temperature on its embeddings.

    `--temperature-sweep` trains the run's system again at several temperatures, with the run's other settings. It plots
    uniformity, tolerance and accuracy against temperature, in RUN/temperature-sweep.json and .html. Finished runs are kept.

    Example: counterpoint analyse runs/first --temperature-sweep --temperatures 0.1 0.2 0.5

    Args:
        run: A run directory. Its system has the task views and a temperature (simclr, moco-v2, dcl, ...).
        temperature_sweep: Train at several temperatures.
        temperatures: At least two temperatures, above 0. Default: 0.03 0.07 0.1 0.2 0.3 0.5 0.7 1.
        seeds: Number of seeds at each temperature, at least 1; the first is the run's own seed.
        jobs: Number of parallel runs, one thread each; at least 1.
    """
    if not temperature_sweep:
        raise CounterpointError("counterpoint analyse RUN needs an analysis; add --temperature-sweep")
    from counterpoint.lab import sweep as room
    from counterpoint.report.analysis import write_sweep_report

    record = room.temperature_sweep(run, temperatures=temperatures or room.GRID, seeds=seeds, jobs=jobs)
    found = room.means(record)
    shown = table("temperature", *found, right=("temperature", *found))
    for number, t in enumerate(record["temperatures"]):
        shown.add_row(f"{t:g}", *(f"{values[number]:.4f}" for values in found.values()))
    console().print(shown)
    page = write_sweep_report(record, run / "temperature-sweep.html")
    say(f"Record: {run / 'temperature-sweep.json'}  Page: {page}")
    return 0
