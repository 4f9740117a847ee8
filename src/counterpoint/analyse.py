"""What the temperature does to a run: the same training at several temperatures, uniformity and tolerance over it.

The uniformity-tolerance dilemma (Wang and Liu, CVPR 2021, arXiv 2012.09740, Sec. 4): a small temperature spreads embeddings
evenly and tears examples of one class apart, a large one keeps them together and separates less.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from counterpoint import catalog
from counterpoint.engine.run import Run, machine, versions
from counterpoint.errors import CounterpointError
from counterpoint.files import replacing
from counterpoint.verify import run_all, stamp_of, summarise

GRID = (0.03, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
MEASURES = ("embedding_uniformity", "embedding_tolerance", "knn_accuracy", "linear_accuracy")


def _one(path: str, temperature: float, seed: int) -> dict[str, float]:
    import torch

    from counterpoint.training import fit_alone, load_source, restore

    torch.set_num_threads(1)  # one thread a run, so that figures do not depend on what else is running
    run = Run.open(path)
    system, config = restore(run)
    config = replace(config, temperature=temperature, evaluate_every=config.epochs)
    started = time.perf_counter()
    rows = fit_alone(system, config, load_source(system, run.config["data"]), seed)
    return summarise(rows) | {"seconds": time.perf_counter() - started}


def temperature_sweep(
    path: Path | str,
    *,
    temperatures: Sequence[float] = GRID,
    seeds: int = 1,
    jobs: int = 2,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a run's system anew at each temperature, with its other settings and data, and write `<run>/temperature-sweep.json`.

    Args:
        path: a run of a system of the task `views` that has a setting `temperature`.
        temperatures: at least two, positive.
        seeds: how many, from the run's own on.
        jobs: runs at a time, one thread each.

    Returns the record. What is done is kept, so an interrupted sweep goes on. CounterpointError for a run without a
    temperature.
    """
    from counterpoint.training import restore

    run = Run.open(path)
    system, config = restore(run)
    if system.task != "views" or "temperature" not in {field.name for field in fields(config)}:
        raise CounterpointError(
            f"{run.path} is a run of {run.slug} (task {system.task}), which has no setting temperature to vary; the sweep is "
            "for systems that learn from views of images at one"
        )
    grid = sorted(set(temperatures))
    if len(grid) < 2 or grid[0] <= 0 or seeds < 1 or jobs < 1:
        raise CounterpointError("a sweep needs at least two different positive temperatures, a seed and a job")
    first = int(run.config["seed"])
    todo = {f"{t:g}-{seed}": (str(run.path), t, seed) for t in grid for seed in range(first, first + seeds)}
    settings = [asdict(config), run.config["data"]]
    done = run_all(
        todo,
        _one,
        cache=run.path / ".sweep",
        stamp=stamp_of(settings, catalog.modules(run.slug)),
        jobs=jobs,
        title=f"{len(grid)} temperatures",
        console=console,
    )
    names = [name for name in MEASURES if all(f"{name}_last" in found for found in done.values())]
    record = {
        "run": run.path.name,
        "slug": run.slug,
        "data": run.config["data"],
        "temperatures": grid,
        "seeds": list(range(first, first + seeds)),
        "measures": {
            name: [[done[f"{t:g}-{s}"][f"{name}_last"] for s in range(first, first + seeds)] for t in grid]
            for name in names
        },
        "versions": versions(),
        "machine": machine(),
    }
    with replacing(run.path / "temperature-sweep.json") as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
    return record


def means(record: dict[str, Any]) -> dict[str, list[float]]:
    """Each measure over the temperatures, the mean over seeds."""
    return {name: [float(np.mean(values)) for values in rows] for name, rows in record["measures"].items()}
