"""Measure the effect of the temperature on a run: train at several temperatures, measure uniformity and tolerance.

The uniformity-tolerance dilemma (Wang and Liu, CVPR 2021, arXiv 2012.09740, Sec. 4): a small temperature spreads embeddings
evenly, but also separates examples of one class. A large temperature keeps them together and separates classes less.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from counterpoint.engine.run import Run, machine, versions
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment
from counterpoint.files import replacing
from counterpoint.lab.runner import figures, run_all, stamp_of
from counterpoint.words import counted

GRID = (0.03, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
MEASURES = ("embedding_uniformity", "embedding_tolerance", "knn_accuracy", "linear_accuracy")


def _one(path: str, temperature: float, seed: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)  # one thread a run, so that figures do not depend on what else is running
    before = Experiment.of_run(path)
    changes = {"temperature": temperature, "evaluate_every": before.config.epochs}
    started = time.perf_counter()
    rows = Experiment.resolve(before.system, before.data, config=before.config, overrides=changes).run(seed)
    return figures(rows) | {"seconds": time.perf_counter() - started}


def temperature_sweep(
    path: Path | str,
    *,
    temperatures: Sequence[float] = GRID,
    seeds: int = 1,
    jobs: int = 2,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a run's system again at each temperature, with its other settings and data. Write `<run>/temperature-sweep.json`.

    Args:
        path: A run of a system of the task `views` with a setting `temperature`.
        temperatures: At least two different temperatures, above 0.
        seeds: Number of seeds, at least 1; the first is the run's own seed.
        jobs: Number of parallel runs, one thread each; at least 1.
        console: Console of the progress bars. Default: standard error.

    Returns the record. Finished runs are kept, so an interrupted sweep continues. The two ends of the grid run first.

    Raises CounterpointError for a run without a temperature, or with one that has no effect (every example has its own).
    """
    run = Run.open(path)
    before = Experiment.of_run(run)
    system, config = before.system, before.config
    if system.task != "views" or "temperature" not in {field.name for field in fields(config)}:
        raise CounterpointError(
            f"{run.path} is a run of {run.slug} (task {system.task}), which has no setting temperature; choose a run of a "
            "system of the task views with a temperature, such as simclr"
        )
    grid = sorted(set(temperatures))
    if len(grid) < 2 or not all(0 < t < math.inf for t in temperatures) or seeds < 1 or jobs < 1:
        raise CounterpointError("a sweep needs at least two different positive temperatures, a seed and a job")
    first = int(run.config["seed"])
    todo = {f"{t!r}-{seed}": (str(run.path), t, seed) for t in grid for seed in range(first, first + seeds)}
    settings = [asdict(config), run.config["data"]]

    def measured(keys: Sequence[str], title: str) -> dict[str, dict[str, float]]:
        return run_all(
            {key: todo[key] for key in keys},
            _one,
            cache=run.path / ".sweep",
            stamp=stamp_of(settings),
            jobs=jobs,
            title=title,
            console=console,
        )

    ends = measured([f"{t!r}-{first}" for t in (grid[0], grid[-1])], "lowest and highest")
    low, high = ({name: value for name, value in found.items() if name != "seconds"} for found in ends.values())
    if low == high:
        raise CounterpointError(
            f"the setting temperature has no effect in this run of {run.slug}: {grid[0]:g} and {grid[-1]:g} give the same "
            "figures to the last digit; choose a run of a system that uses it"
        )
    done = measured(list(todo), f"{counted(len(grid), 'temperature')}")
    names = [name for name in MEASURES if all(name in found for found in done.values())]
    record = {
        "run": run.path.name,
        "path": str(run.path),
        "slug": run.slug,
        "data": run.config["data"],
        "temperatures": grid,
        "seeds": list(range(first, first + seeds)),
        "measures": {
            name: [[done[f"{t!r}-{s}"][name] for s in range(first, first + seeds)] for t in grid] for name in names
        },
        "versions": versions(),
        "machine": machine(),
    }
    with replacing(run.path / "temperature-sweep.json") as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
    return record


def means(record: dict[str, Any]) -> dict[str, list[float]]:
    """Return each metric's mean over seeds, in the order of the temperatures."""
    return {name: [float(np.mean(values)) for values in rows] for name, rows in record["measures"].items()}
