"""Claims: a paper's central sentence, tried at laptop scale on paired seeds.

Every arm of a claim runs on every seed with the same data, budget and settings; arms are compared by their paired
differences. The interval is the two-sided 95 % t interval of the mean difference; the verdict reads it:

    holds            the whole interval lies above zero
    reversed         the whole interval lies below zero
    no difference    the interval holds zero

A comparison that `at_least` names a figure for also says whether the mean reaches it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from counterpoint import catalog
from counterpoint.engine.run import machine, versions
from counterpoint.errors import CounterpointError, unknown
from counterpoint.files import replacing
from counterpoint.systems.base import Claim, System

INTERVAL = "95 % paired t interval"


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of one run from its epochs: for each test metric its mean over the last three evaluations, its best, its last;
    of what is recorded in training, under `train_`, the last epoch's mean."""
    outcome: dict[str, float] = {}
    for name in (key.removeprefix("test/") for key in rows[-1] if key.startswith("test/")):
        values = [row[f"test/{name}"] for row in rows if f"test/{name}" in row]
        outcome |= {
            f"{name}_last3": float(np.mean(values[-3:])),
            f"{name}_best": float(np.nanmax(values)),
            f"{name}_last": values[-1],
        }
    last = rows[-1]
    return outcome | {f"train_{k.removeprefix('train/')}_last": last[k] for k in last if k.startswith("train/")}


def experiment(system: System, claim: Claim, arm: str, seed: int, *, quick: bool = False) -> dict[str, float]:
    """Train one arm with one seed and return its metrics."""
    import torch

    from counterpoint.experiment import Experiment

    torch.set_num_threads(1)  # one thread a run, so that figures do not depend on what else is running
    options = dict(claim.data_options) | (claim.quick_data_options if quick else {})
    if claim.data_seeded:
        options["seed"] = seed
    settings = claim.setting | (claim.quick if quick else {}) | claim.arms[arm]
    tried = Experiment.resolve(system, claim.data, overrides=settings, options=options, recipe=False)
    return summarise(tried.run(seed))


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of the 95 % t interval; the bounds are nan for fewer than two seeds."""
    from scipy import stats

    values = np.asarray(differences, float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    """Say what a 95 % interval of the difference shows."""
    if math.isnan(low):
        return "undecided: one seed has no interval"
    return "holds" if low > 0 else "reversed" if high < 0 else "no difference"


MANY_SEEDS = 30  # an effect that needs more seeds than these counts as no difference


def seeds_needed(differences: Sequence[float], most: int = 1000) -> int | None:
    """Count the seeds at which a paired t test would find an effect of the size seen, in four of five repetitions.

    Args:
        differences: paired differences, at least two.
        most: the largest count tried.

    Returns None where `most` seeds do not suffice. The spread is that of the differences; power 80 %, level 5 %.
    """
    from scipy import stats

    values = np.asarray(differences, float)
    mean, spread = abs(float(values.mean())), float(values.std(ddof=1))
    if spread <= 1e-12 * mean:  # equal but for rounding
        return 2 if mean else None
    for n in range(2, most + 1):
        critical = stats.t.ppf(0.975, n - 1)
        if stats.nct.sf(critical, n - 1, mean / spread * math.sqrt(n)) >= 0.8:
            return n
    return None


def judge(
    claim: Claim, results: Mapping[str, Mapping[str, Mapping[str, float]]], seeds: Sequence[int]
) -> dict[str, Any]:
    """Comparisons and verdict from `results[arm][str(seed)][metric]`."""
    comparisons = []
    for pair in claim.comparisons:
        metric = pair.metric or claim.metric
        sign = -1 if pair.lower else 1

        def gain(arm: str, baseline: str, seed: int, metric: str = metric, sign: int = sign) -> float:
            return sign * (results[arm][str(seed)][metric] - results[baseline][str(seed)][metric])

        arm, baseline = pair.arm, pair.baseline
        differences = [gain(arm, baseline, s) for s in seeds]
        if pair.beyond:
            differences = [d - gain(*pair.beyond, s) for d, s in zip(differences, seeds, strict=True)]
            arm, baseline = f"{arm} - {baseline}", " - ".join(pair.beyond)
        mean, low, high = paired(differences)
        comparisons.append(
            {
                "arm": arm,
                "baseline": baseline,
                "metric": metric,
                **({"lower": True} if pair.lower else {}),
                "differences": differences,
                "mean": mean,
                "low": None if math.isnan(low) else low,
                "high": None if math.isnan(high) else high,
                "interval": f"{INTERVAL}, {len(seeds) - 1} degrees of freedom",
                "verdict": verdict(low, high),
                "expected": pair.at_least,
                "reaches_expected": mean >= pair.at_least,
            }
        )
    # The claim's own sentence is its first comparison: the whole method against the baseline.
    return {"comparisons": comparisons, "verdict": comparisons[0]["verdict"]}


def _one(slug: str, variant: str | None, arm: str, seed: int, quick: bool) -> dict[str, float]:
    claim = _claim_of(slug)
    claim = claim.variants[variant] if variant else claim
    return experiment(catalog.load_system(slug), claim, arm, seed, quick=quick)


def _claim_of(slug: str) -> Claim:
    claim = catalog.load_system(slug).claim
    if claim is None:
        raise CounterpointError(
            f"{slug} is a baseline without a claim of its own; compare it: counterpoint compare {slug} ..."
        )
    return claim


def verify(
    slug: str,
    *,
    seeds: int = 5,
    quick: bool = False,
    jobs: int = 2,
    out: Path = Path("results/claims"),
    variants: bool = True,
    console: Console | None = None,
    run_one: Callable[[str, str | None, str, int, bool], dict[str, float]] = _one,
) -> dict[str, Any]:
    """Run the claim of `slug` on seeds 0..seeds-1 and write `<out>/<slug>.json`; returns the record.

    Finished (variant, arm, seed) runs are kept in `<out>/.partial/` and not run again when an interrupted verification
    is started anew. A `quick` rehearsal uses a smaller setting, is named so, and writes `<slug>-quick.json`.
    """
    if seeds < 1 or jobs < 1:
        raise CounterpointError("--seeds and --jobs must be at least 1")
    claim = _claim_of(slug)
    claims: dict[str | None, Claim] = {None: claim} | (dict(claim.variants) if variants else {})
    name = f"{slug}-quick" if quick else slug
    stamp = _stamp(claims, quick, catalog.modules(slug))
    todo = [(v, arm, seed) for v, claim in claims.items() for seed in range(seeds) for arm in claim.arms]
    done = run_all(
        {f"{v or 'claim'}-{arm}-{seed}": (slug, v, arm, seed, quick) for v, arm, seed in todo},
        run_one,
        cache=out / ".partial" / name,
        stamp=stamp,
        jobs=jobs,
        title=f"verify {name}",
        console=console,
    )
    record: dict[str, Any] = {"slug": slug, "title": catalog.get(slug).title}
    if quick:
        record["quick"] = "a rehearsal on a smaller setting; not evidence"
    for variant, claim in claims.items():
        runs = {(arm, seed): done[f"{v or 'claim'}-{arm}-{seed}"] for v, arm, seed in todo if v == variant}
        part = _record(claim, runs, seeds, quick)
        if variant is None:
            record |= part
        else:
            record.setdefault("variants", {})[variant] = part
    record |= {"versions": versions(), "machine": machine()}
    with replacing(out / f"{name}.json") as written:
        written.write((json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    return record


def _record(claim: Claim, runs: Mapping[tuple[str, int], dict[str, float]], seeds: int, quick: bool) -> dict[str, Any]:
    results = {arm: {str(seed): runs[arm, seed] for seed in range(seeds)} for arm in claim.arms}
    return {
        "claim": claim.sentence,
        "data": claim.data,
        "setting": claim.setting | (claim.quick if quick else {}),
        "metric": claim.metric,
        "metrics": sorted({m for per_seed in results.values() for metrics in per_seed.values() for m in metrics}),
        "baseline": claim.baseline,
        "arms": claim.arms,
        "seeds": list(range(seeds)),
        "results": results,
        **judge(claim, results, range(seeds)),
        "notes": list(claim.notes),
    }


def run_all(
    todo: Mapping[str, tuple[Any, ...]],
    run_one: Callable[..., dict[str, float]],
    *,
    cache: Path,
    stamp: str,
    jobs: int,
    title: str,
    console: Console | None = None,
) -> dict[str, dict[str, float]]:
    """`run_one(*arguments)` for everything in `todo`, `jobs` at a time in processes of their own, under a progress bar.

    What is done is kept in `cache` and not run again as long as `stamp` is the same.
    """
    done: dict[str, dict[str, float]] = {}
    for key in todo:
        file = cache / f"{key}.json"
        if file.is_file():
            kept = json.loads(file.read_text())
            if kept["stamp"] == stamp:
                done[key] = kept["metrics"]
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
    with progress:
        bar = progress.add_task(title, total=len(todo), completed=len(done))

        def finish(key: str, metrics: dict[str, float]) -> None:
            done[key] = metrics
            with replacing(cache / f"{key}.json") as file:
                file.write(json.dumps({"stamp": stamp, "metrics": metrics}).encode())
            progress.advance(bar)

        rest = [key for key in todo if key not in done]
        if jobs == 1 or len(rest) <= 1:
            for key in rest:
                finish(key, run_one(*todo[key]))
        else:
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                futures = {pool.submit(run_one, *todo[key]): key for key in rest}
                try:
                    for future in as_completed(futures):
                        finish(futures[future], future.result())
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return done


def _stamp(claims: Mapping[str | None, Claim], quick: bool, modules: Sequence[str]) -> str:
    """What a kept result depends on: the settings, the libraries' versions, and the code of the system and of the core."""
    return stamp_of([[asdict(replace(claim, variants={}, notes=())) for claim in claims.values()], quick], modules)


def stamp_of(settings: Any, modules: Sequence[str]) -> str:
    """A short hash of settings, versions, the source of these modules and that of the core."""
    import hashlib
    import inspect
    from importlib import import_module

    found = hashlib.sha256(json.dumps([settings, versions()], sort_keys=True).encode())
    for module in modules:
        found.update(inspect.getsource(import_module(module)).encode())
    for path in sorted((Path(__file__).parent / "core").glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def read_record(slug: str, folder: Path = Path("results/claims")) -> dict[str, Any]:
    """The record of a claim verified before; CounterpointError when there is none."""
    file = folder / f"{slug}.json"
    if not file.is_file():
        if slug not in catalog.entries():
            raise unknown("system", slug, catalog.entries())
        raise CounterpointError(f"no record of {slug} in {folder}/; make one: counterpoint verify {slug}")
    return dict(json.loads(file.read_text()))
