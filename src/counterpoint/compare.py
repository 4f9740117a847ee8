"""Which of several systems does best on one source of data: the same seeds, paired differences, intervals, a page.

Every system runs with its own settings for the data (`Experiment.resolve`); what must be equal for a fair answer, the
number of epochs and the batch, can be set for all. The first system is the one the others are measured against.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from counterpoint import catalog
from counterpoint.engine.run import machine, versions
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, task_class
from counterpoint.files import replacing
from counterpoint.systems.settings import flat
from counterpoint.verify import MANY_SEEDS, paired, run_all, seeds_needed, stamp_of, summarise, verdict

SAID = {"holds": "better", "reversed": "worse"}


def _one(slug: str, data: str, seed: int, overrides: dict[str, Any]) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)  # one thread a run, so that figures do not depend on what else is running
    started = time.perf_counter()
    rows = Experiment.resolve(slug, data, overrides=overrides).run(seed)
    return summarise(rows) | {"seconds": time.perf_counter() - started}


def compare(
    slugs: Sequence[str],
    data: str,
    *,
    seeds: int = 3,
    jobs: int = 2,
    out: Path = Path("results/compare"),
    metric: str | None = None,
    overrides: dict[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run every system on seeds 0..seeds-1 and write `<out>/<name>.json`; returns the record, in the form of a claim's.

    `metric` is what the differences are taken in; by default what the task judges by. Finished runs are kept, so an
    interrupted comparison goes on. Raises CounterpointError for systems of tasks that cannot be compared.
    """
    overrides = overrides or {}
    if len(slugs) < 2 or len(set(slugs)) < len(slugs):
        raise CounterpointError("name at least two different systems to compare")
    if seeds < 1 or jobs < 1:
        raise CounterpointError("--seeds and --jobs must be at least 1")
    systems = {slug: catalog.load_system(slug) for slug in slugs}
    tasks = {slug: task_class(system) for slug, system in systems.items()}
    headlines = {task.headline for task in tasks.values()}
    if len(headlines) > 1 and metric is None:
        said = ", ".join(f"{slug} by {task.headline}" for slug, task in tasks.items())
        raise CounterpointError(f"these are judged by different measures ({said}); name one with --metric")
    configs = {slug: Experiment.resolve(slug, data, overrides=overrides).config for slug in slugs}
    name = re.sub(r"[^\w.-]+", "-", f"{'-'.join(slugs)}-on-{data}")[:120]
    done = run_all(
        {f"{slug}-{seed}": (slug, data, seed, overrides) for seed in range(seeds) for slug in slugs},
        _one,
        cache=out / ".partial" / name,
        stamp=stamp_of(
            [data, {slug: flat(config) for slug, config in configs.items()}],
            [module for slug in slugs for module in catalog.modules(slug)],
        ),
        jobs=jobs,
        title=f"compare {len(slugs)} systems on {data}",
        console=console,
    )
    results = {slug: {str(seed): done[f"{slug}-{seed}"] for seed in range(seeds)} for slug in slugs}
    named = metric is not None
    metric = metric or f"{headlines.pop()}_last"
    shared = sorted(set.intersection(*(set(found) for runs in results.values() for found in runs.values())))
    if metric not in shared:
        raise CounterpointError(f"not every system has the measure '{metric}'; all have: {', '.join(shared)}")
    comparisons = []
    for slug in slugs[1:]:
        differences = [results[slug][str(s)][metric] - results[slugs[0]][str(s)][metric] for s in range(seeds)]
        mean, low, high = paired(differences)
        said = verdict(low, high)
        needed = seeds_needed(differences) if seeds > 1 else None
        if said == "no difference" and needed is not None and needed <= MANY_SEEDS:
            said = f"undecided: an effect of this size needs about {needed} seeds"
        bounds = (None, None) if seeds < 2 else (low, high)
        comparisons.append(
            {
                "arm": slug,
                "baseline": slugs[0],
                "metric": metric,
                "differences": differences,
                "mean": mean,
                "low": bounds[0],
                "high": bounds[1],
                "interval": f"95 % paired t interval, {seeds - 1} degrees of freedom",
                "verdict": SAID.get(said, said),
            }
        )
    everything = {slug: flat(config) for slug, config in configs.items()}
    same = {
        key: value
        for key, value in everything[slugs[0]].items()
        if all(key in config and config[key] == value for config in everything.values())
    }
    record = {
        "name": name,
        "claim": f"Which of {', '.join(slugs)} does best on {data}?",
        "data": data,
        "setting": same,
        "metric": metric,
        "metrics": shared,
        "baseline": slugs[0],
        "arms": {slug: {k: v for k, v in config.items() if k not in same} for slug, config in everything.items()},
        "seeds": list(range(seeds)),
        "results": results,
        "comparisons": comparisons,
        "notes": _notes(everything),
        "options": {**overrides, **({"metric": metric} if named else {})},
        "versions": versions(),
        "machine": machine(),
    }
    with replacing(out / f"{name}.json") as file:
        file.write((json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    return record


def _notes(configs: dict[str, dict[str, Any]]) -> list[str]:
    """What makes a comparison less than fair."""
    notes = []
    for setting in ("epochs", "batch_size"):
        values = {slug: config.get(setting) for slug, config in configs.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{slug} {value}" for slug, value in values.items())
            notes.append(f"Not the same {setting} for all: {said}. Set it with --{setting.replace('_', '-')}.")
    notes.append("Each system runs with its own settings for this data; nobody's were tuned on it.")
    return notes
