"""Compare several systems on one data source: the same seeds, paired differences, intervals, a page.

Every system runs with its own settings for the data (`Experiment.resolve`). A fair comparison needs the same number of epochs
and the same batch; both can be set for all systems. The others are compared with the first system.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from counterpoint import catalog
from counterpoint import data as sources
from counterpoint.engine.run import machine, versions
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment, task_class
from counterpoint.lab import runner, statistics
from counterpoint.lab.cluster import Cluster
from counterpoint.lab.verify import RunOne, interval_said, write
from counterpoint.systems.settings import flat
from counterpoint.words import counted

SAID = {statistics.HOLDS: "better", statistics.REVERSED: "worse"}
FOLDER = Path("results/compare")
UNSEEN = "unseen_"  # before the metrics of a domain that was left out


def compare(
    slugs: Sequence[str],
    data: str,
    *,
    seeds: int = 3,
    jobs: int | None = 2,
    out: Path = FOLDER,
    metric: str | None = None,
    overrides: dict[str, Any] | None = None,
    leave_one_domain_out: bool = False,
    console: Console | None = None,
    run_one: RunOne | None = None,
    cluster: Cluster | None = None,
) -> dict[str, Any]:
    """Run every system on seeds 0..seeds-1 and write `<out>/<name>.json`. Return the record.

    With `leave_one_domain_out` each seed has a run for each domain of the data. It trains on the other domains, and its
    metric is that of the domain left out. The figure of a seed is the mean over the domains, as in DomainBed (arXiv 2007.01434).

    Args:
        slugs: At least two different systems. The others are compared with the first.
        data: The data source, the same for all seeds.
        seeds: Number of seeds, at least 1.
        jobs: Number of parallel runs, one thread each; at least 1. None: as many as there is room for.
        out: Folder of the record. Finished runs are kept in its `.partial/`, so an interrupted comparison continues.
        metric: Name of the metric to compare. Default: the task's headline metric, on the domain left out if there is one.
        overrides: Settings for all systems that have them. Default: none.
        leave_one_domain_out: Leave each domain of the data out in turn.
        console: Console of the progress bar. Default: standard error.
        run_one: Function that runs a system. Default: `lab.runner.run_one`.
        cluster: The cluster whose machines run the systems. Default: this machine alone. The figures are the same.

    Raises CounterpointError for systems of tasks that cannot be compared, and for a metric that a system lacks.
    """
    overrides = overrides or {}
    if len(slugs) < 2 or len(set(slugs)) < len(slugs):
        raise CounterpointError("name at least two different systems to compare")
    if seeds < 1 or (jobs is not None and jobs < 1):
        raise CounterpointError("--seeds and --jobs must be at least 1")
    systems = {slug: catalog.load_system(slug) for slug in slugs}
    tasks = {slug: task_class(system) for slug, system in systems.items()}
    headlines = {task.headline for task in tasks.values()}
    if len(headlines) > 1 and metric is None:
        said = ", ".join(f"{slug} by {task.headline}" for slug, task in tasks.items())
        raise CounterpointError(f"these systems have different headline metrics ({said}); choose one with --metric")
    specs = _domains_left_out(data, tasks[slugs[0]].contract) if leave_one_domain_out else {"": data}
    known = {slug: flat(Experiment.resolve(slug, data).config) for slug in slugs}
    if strange := [name for name in overrides if not any(name in names for names in known.values())]:
        Experiment.resolve(slugs[0], data, overrides={strange[0]: overrides[strange[0]]})  # raises, with near matches
    given = {slug: {k: v for k, v in overrides.items() if k in names} for slug, names in known.items()}
    experiments = {slug: Experiment.resolve(slug, data, overrides=given[slug]) for slug in slugs}
    everything = {slug: flat(experiment.config) for slug, experiment in experiments.items()}
    name = re.sub(r"[^\w.-]+", "-", f"{'-'.join(slugs)}-on-{data}{'-by-domain' if leave_one_domain_out else ''}")[:120]
    done = runner.run_all(
        {
            # A metric that a system lacks is found in its first run, after one epoch.
            _key(slug, seed, number): (
                *(slug, spec, {}, given[slug], seed, True),
                *([metric] if metric and seed == number == 0 and run_one is None else ()),
            )
            for seed in range(seeds)
            for slug in slugs
            for number, spec in enumerate(specs.values())
        },
        run_one or runner.run_one,
        cache=out / ".partial" / name,
        stamp=runner.stamp_of([*specs.values(), everything]),
        jobs=jobs,
        title=f"compare {counted(len(slugs), 'system')} on {data}",
        console=console,
        cluster=cluster,
    )
    by_domain = {
        domain: {slug: {str(s): _figures(done[_key(slug, s, number)]) for s in range(seeds)} for slug in slugs}
        for number, domain in enumerate(specs)
    }
    results = {
        slug: {str(seed): _mean([runs[slug][str(seed)] for runs in by_domain.values()]) for seed in range(seeds)}
        for slug in slugs
    }
    shared = sorted(set.intersection(*(set(found) for runs in results.values() for found in runs.values())))
    named = metric is not None
    before = UNSEEN if leave_one_domain_out else ""
    metric = metric or before + headlines.pop()
    if metric not in shared and not named:  # say pictures with masks, of which no class is known
        instead = next(iter(tasks.values()))
        metric = next(
            (before + other for other in getattr(instead, "stand_ins", ()) if before + other in shared), metric
        )
    if metric not in shared:
        raise CounterpointError(
            f"not every system has the metric '{metric}'; all have: {', '.join(shared)}; "
            "name one of them with --metric (in Python: metric=). Accuracies need labelled data"
        )
    first = tasks[slugs[0]]
    lower = bool(getattr(first, "lower", False)) and metric.removeprefix(UNSEEN) == first.headline  # an error
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
        "results": {
            slug: {seed: {k: runner.plain(v) for k, v in found.items()} for seed, found in runs.items()}
            for slug, runs in results.items()
        },
        "comparisons": comparisons(results, slugs, metric, seeds, lower=lower),
        "notes": [f"{slug}: {note}." for slug in slugs for note in experiments[slug].unreached] + _notes(everything),
        "options": {**overrides, **({"metric": metric} if named else {})},
        **({"domains": _of_metric(by_domain, metric)} if leave_one_domain_out else {}),
        "commit": runner.commit(),
        "versions": versions(),
        "machine": machine(),
    }
    write(record, out / f"{name}.json")
    return record


def _domains_left_out(data: str, task: str) -> dict[str, str]:
    """Return the data's domains, and for each the name of the data without it. CounterpointError for fewer than two."""
    if "unseen=" in data:
        raise CounterpointError(
            "--leave-one-domain-out leaves each domain out in turn: take unseen=... out of the name of the data"
        )
    domains = tuple(getattr(sources.load(data, task=task), "domains", ()))
    if len(domains) < 2:
        raise CounterpointError(
            f"--leave-one-domain-out needs data of at least two domains; {data} has {len(domains)}. Folders name them with "
            "?domain=folder, tables with ?domain=COLUMN"
        )
    return {domain: f"{data}{'&' if '?' in data else '?'}unseen={domain}" for domain in domains}


def _key(slug: str, seed: int, number: int) -> str:
    """Return the name of a run: domain 0 has that of a comparison without domains."""
    return f"{slug}-{seed}" + (f"-{number}" if number else "")


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a run without the fingerprint of its data."""
    return {name: value for name, value in found.items() if name != runner.DATA}


def _mean(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the metrics that all runs of a seed have; seconds are added."""
    shared = set.intersection(*(set(run) for run in runs))
    averaged = {name: fmean(run[name] for run in runs) if len(runs) > 1 else runs[0][name] for name in shared}
    return averaged | ({"seconds": sum(run["seconds"] for run in runs)} if "seconds" in shared else {})


def _of_metric(by_domain: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str) -> dict[str, Any]:
    """Return one metric of every run by domain left out, system and seed."""
    return {
        domain: {
            slug: {seed: runner.plain(run[metric]) for seed, run in runs.items()} for slug, runs in systems.items()
        }
        for domain, systems in by_domain.items()
    }


def comparisons(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    slugs: Sequence[str],
    metric: str,
    seeds: int,
    *,
    lower: bool = False,
) -> list[dict[str, Any]]:
    """Judge the differences of all other systems to the first, as one family of contrasts.

    Args:
        results: figures by system and seed.
        slugs: the systems.
        metric: the metric to compare.
        seeds: number of seeds.
        lower: the smaller the metric, the better. Differences count gains, so they are those of the negative metric.
    """
    sign = -1 if lower else 1
    contrasts = [
        statistics.Contrast(
            [sign * (results[slug][str(s)][metric] - results[slugs[0]][str(s)][metric]) for s in range(seeds)]
        )
        for slug in slugs[1:]
    ]
    found = []
    for slug, contrast, finding in zip(slugs[1:], contrasts, statistics.judge(contrasts, two_sided=True), strict=True):
        said = finding.verdict
        if said == statistics.NONE:
            needed = statistics.seeds_needed(contrast.differences, statistics.MANY_SEEDS, level=finding.level)
            if needed is not None:
                said = f"undecided: an effect of this size needs about {needed} seeds"
        found.append(
            {
                "arm": slug,
                "baseline": slugs[0],
                "metric": metric,
                "differences": list(contrast.differences),
                "mean": finding.mean,
                "low": finding.low,
                "high": finding.high,
                "p_holm": finding.p_holm,
                "detectable": finding.detectable,
                "interval": interval_said(finding.level, seeds),
                "verdict": SAID.get(said, said),
            }
        )
    return found


def _notes(configs: dict[str, dict[str, Any]]) -> list[str]:
    """List the reasons that make a comparison less than fair, as sentences."""
    notes = []
    for setting in ("epochs", "batch_size"):
        values = {slug: config.get(setting) for slug, config in configs.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{slug} {value}" for slug, value in values.items())
            notes.append(f"Not the same {setting} for all: {said}. Set it with --{setting.replace('_', '-')}.")
    notes.append("Each system runs with its own settings for this data; none were tuned on it.")
    return notes
