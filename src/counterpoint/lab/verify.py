"""Verify claims: test a paper's central sentence at laptop scale on paired seeds, by its protocol.

Every arm runs on every seed with the same budget and the same data, which each seed draws again. The bound of its interval
judges each conjunct of the sentence. The interval's level comes from Holm's procedure over the conjuncts; see
`lab.statistics`. The claim's verdict combines theirs:

    holds            every conjunct holds
    partly           some hold, or a gain is shown that is smaller than its margin
    no difference    none holds; the record has the smallest difference that could have been found
    reversed         none holds, and the opposite of at least one is shown
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from counterpoint import catalog
from counterpoint.engine.run import machine, versions
from counterpoint.errors import CounterpointError, ProtocolError, unknown
from counterpoint.files import replacing
from counterpoint.lab import runner, statistics
from counterpoint.lab.cluster import Cluster
from counterpoint.lab.protocol import LEAST_SEEDS, Conjunct, Protocol, Results, fault, of_system
from counterpoint.words import counted

RunOne = Callable[[str, str, Mapping[str, Any], Mapping[str, Any], int, bool], dict[str, Any]]
FOLDER = Path("results/claims")
UNJUDGED = "not judged"


def judge(protocol: Protocol, results: Results, seeds: Sequence[int], *, strict: bool = True) -> dict[str, Any]:
    """Judge every conjunct of a claim and the claim: `conjuncts`, `reported`, `verdict`, `smallest_detectable`.

    Args:
        protocol: The claim.
        results: Nested mapping: arm -> seed -> metric -> figure.
        seeds: The seeds to judge.
        strict: Raise ProtocolError where figures cannot decide a conjunct. False: the conjunct is "not judged", its row
            has the reason, and the claim cannot hold.
    """
    faults = {number: fault(protocol, one, results, seeds) for number, one in enumerate(protocol.conjuncts)}
    for number, said in faults.items():
        if said and strict:
            raise ProtocolError(f"claim of {protocol.slug}, conjunct '{protocol.conjuncts[number].says}': {said}")
    able = [number for number, said in faults.items() if not said]
    contrasts = [_contrast(protocol.conjuncts[number], results, seeds) for number in able]
    found = dict(zip(able, statistics.judge(contrasts), strict=True))
    conjuncts = []
    for number, one in enumerate(protocol.conjuncts):
        if number in found:
            differences = contrasts[able.index(number)].differences
            conjuncts.append(row(protocol, one, found[number], differences, len(seeds)))
        else:
            conjuncts.append(described(protocol, one) | {"verdict": UNJUDGED, "refused": faults[number]})
    verdicts = [str(one["verdict"]) for one in conjuncts]
    verdict = statistics.of_all(verdicts)
    if all(said == UNJUDGED for said in verdicts):
        verdict = UNJUDGED
    outcome: dict[str, Any] = {"conjuncts": conjuncts, "verdict": verdict}
    reported = []
    for one in protocol.reported:
        if fault(protocol, one, results, seeds) is None:
            contrast = _contrast(one, results, seeds)
            made = row(protocol, one, statistics.judge([contrast])[0], contrast.differences, len(seeds))
            reported.append({name: value for name, value in made.items() if name not in ("verdict", "p", "p_holm")})
    outcome["reported"] = reported
    return outcome


def _contrast(conjunct: Conjunct, results: Results, seeds: Sequence[int]) -> statistics.Contrast:
    return statistics.Contrast(conjunct.differences(results, seeds), conjunct.test, conjunct.margin)


def described(protocol: Protocol, conjunct: Conjunct) -> dict[str, Any]:
    """Describe a conjunct without its outcome, for records and pages."""
    return {
        "says": conjunct.says,
        "arm": conjunct.judged,
        "baseline": conjunct.against,
        "metric": conjunct.metric,
        "unit": protocol.metrics[conjunct.metric].unit,
        "direction": conjunct.direction,
        "test": conjunct.test,
        "margin": conjunct.margin,
        "expected": conjunct.expected,
    }


def row(
    protocol: Protocol,
    conjunct: Conjunct,
    finding: statistics.Finding,
    differences: Sequence[float],
    seeds: int,
) -> dict[str, Any]:
    """Describe a conjunct with its outcome, for records and pages."""
    expected = {}
    if conjunct.expected is not None and finding.low is not None:
        expected["reaches_expected"] = finding.low > conjunct.expected
    return {
        **described(protocol, conjunct),
        "differences": list(differences),
        **{name: value for name, value in asdict(finding).items() if name != "level"},
        "interval": interval_said(finding.level, seeds, paired=conjunct.baseline is not None),
        "level": finding.level,
        **expected,
    }


def interval_said(level: float, seeds: int, *, paired: bool = True) -> str:
    """Describe an interval: its level, its kind, its degrees of freedom."""
    kind = "paired t interval" if paired else "t interval"
    return f"{100 * level:.4g} % {kind}, {seeds - 1} degrees of freedom"


def verify(
    slug: str,
    *,
    seeds: int | None = None,
    quick: bool = False,
    jobs: int | None = 2,
    out: Path = FOLDER,
    variants: bool = True,
    console: Console | None = None,
    protocol: Protocol | None = None,
    run_one: RunOne | None = None,
    cluster: Cluster | None = None,
) -> dict[str, Any]:
    """Run the claim of `slug` by its protocol and write `<out>/<slug>.json`. Return the record.

    Args:
        slug: The system.
        seeds: Number of seeds, from 0 on; at least 5, or 1 with `quick`. Default: the protocol's.
        quick: Rehearse on the protocol's smaller setting. The result is no evidence; it is written to `<slug>-quick.json`.
        jobs: Number of parallel runs, one thread each; at least 1. None: as many as there is room for.
        out: Folder of the records. Finished runs are kept in its `.partial/`, so an interrupted verification continues.
        variants: Also run the protocol's variants. Without them the record keeps the variants that it had, with their own commit.
        console: Console of the progress bars. Default: standard error.
        protocol: The protocol. Default: the package's protocol of `slug`.
        run_one: Function that runs an arm. Default: `lab.runner.run_one`.
        cluster: The cluster whose machines run the arms. Default: this machine alone. The figures are the same.

    Raises ProtocolError for a protocol that is invalid or not committed, and for figures that cannot decide the claim.
    """
    protocol = protocol or of_system(slug)
    count = protocol.seeds if seeds is None else seeds
    if count < 1 or (jobs is not None and jobs < 1):
        raise CounterpointError("--seeds and --jobs must be at least 1")
    if count < LEAST_SEEDS and not quick:
        raise ProtocolError(
            f"claim of {slug}: {counted(count, 'seed')}; a claim needs at least {LEAST_SEEDS} (or --quick, for a rehearsal)"
        )
    if not quick and protocol.path and runner.uncommitted(protocol.path):
        raise ProtocolError(f"claim of {slug}: {protocol.path} is not committed; commit it before its seeds run")
    made_by = runner.commit()
    parts: dict[str | None, Protocol] = {None: protocol}
    if variants:
        parts.update(protocol.variants)
    name = f"{slug}-quick" if quick else slug
    record: dict[str, Any] = {"slug": slug, "title": catalog.get(slug).title}
    if quick:
        record["quick"] = "a rehearsal on a smaller setting; not evidence"
    for variant, part in parts.items():
        where = out / ".partial" / name / (re_named(variant) if variant else "claim")
        found = _part(slug, part, seeds or part.seeds, quick, jobs, where, f"verify {name}{f', {variant}' if variant else ''}",
                      console, run_one or runner.run_one, cluster)  # fmt: skip
        if variant is None:
            record |= found
        else:
            record.setdefault("variants", {})[variant] = found | {
                "missing": missing(found | {"commit": made_by}),
                "commit": made_by,
            }
    if not variants and not quick and (kept := earlier_variants(protocol, out)):
        record["variants"] = kept
    record |= {
        "protocol": {
            "sha256": protocol.sha256,
            "seeds": protocol.seeds,
            "minutes": protocol.minutes,
            "ran": protocol.sha256,
        },
        "commit": made_by,
        "missing": missing(record | {"commit": made_by}),
        "versions": versions(),
        "machine": machine(),
    }
    write(record, out / f"{name}.json")
    return record


def earlier_variants(protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Return the variants of a recorded claim that the protocol still has. Each names the commit of its own figures."""
    file = folder / f"{protocol.slug}.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    return {
        name: {"commit": record.get("commit")} | part
        for name, part in record.get("variants", {}).items()
        if name in protocol.variants
    }


def re_named(name: str) -> str:
    """Return a variant's name in a form that is valid for a folder."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)


def _part(
    slug: str,
    part: Protocol,
    count: int,
    quick: bool,
    jobs: int | None,
    where: Path,
    title: str,
    console: Console | None,
    run_one: RunOne,
    cluster: Cluster | None,
) -> dict[str, Any]:
    """Run and judge a claim or one of its variants."""
    fixed = asdict(replace(part, variants={}, notes=(), sentence="", conjuncts=(), reported=(), metrics={}, path=""))
    stamp = runner.stamp_of([fixed, quick])
    points: dict[str, dict[str, Any]] = {arm: {} for arm in part.arms}
    tuned: dict[str, Any] | None = None
    if part.tuning is not None and not quick:
        points, tuned = _tuned(slug, part, jobs, where / "tuning", stamp, title, console, run_one, cluster)
    seeds = list(range(count))
    done = runner.run_all(
        {
            f"{re_named(arm)}-{seed}": (
                slug, part.data, part.options(seed, quick=quick),
                part.settings(arm, points[arm], quick=quick), seed, False,
            )
            for seed in seeds
            for arm in part.arms
        },
        run_one,
        cache=where,
        stamp=runner.stamp_of([stamp, points]),
        jobs=jobs,
        title=title,
        console=console,
        cluster=cluster,
    )  # fmt: skip
    runs = {arm: {str(seed): dict(done[f"{re_named(arm)}-{seed}"]) for seed in seeds} for arm in part.arms}
    data = {arm: [run.pop(runner.DATA, None) for run in by_seed.values()] for arm, by_seed in runs.items()}
    minutes = sum(run.pop(runner.SECONDS, 0.0) for by_seed in runs.values() for run in by_seed.values()) / 60
    redrawn = check_data(part, data)
    return {
        "claim": part.sentence,
        "kind": part.kind,
        "data": part.data,
        "data_options": dict(part.data_options) | (part.quick_data_options if quick else {}),
        "data_redrawn": redrawn,
        "setting": part.setting | (part.quick if quick else {}),
        **({"tuned": tuned} if tuned else {}),
        "metric": part.conjuncts[0].metric,
        "metrics": sorted({name for by_seed in runs.values() for run in by_seed.values() for name in run}),
        "meanings": {name: {"unit": one.unit, "says": one.says} for name, one in part.metrics.items()},
        "baseline": part.conjuncts[0].against,
        "arms": part.arms,
        "seeds": seeds,
        "results": {
            arm: {seed: {name: runner.plain(value) for name, value in run.items()} for seed, run in by_seed.items()}
            for arm, by_seed in runs.items()
        },
        "minutes": round(minutes, 2),
        # A rehearsal is too small for the rules on figures: they would reject values at a bound.
        **judge(part, runs, seeds, strict=not quick),
        "notes": [*part.notes, *_over_budget(part, minutes)],
    }


def _over_budget(part: Protocol, minutes: float) -> list[str]:
    if minutes <= part.minutes:
        return []
    return [f"The runs took {minutes:.1f} processor minutes; the protocol's budget is {part.minutes:g}."]


def check_data(part: Protocol, digests: Mapping[str, Sequence[str | None]]) -> bool | None:
    """Check that all arms of a seed were trained on the same data, and different seeds on different data.

    Args:
        part: The claim or variant.
        digests: Maps each arm to the digests of its training split, by seed; None where a split has no digest.

    Returns True where the seeds drew different data, None where that is unknown. Raises ProtocolError where they did not,
    or where arms differ.
    """
    first = next(iter(digests.values()))
    if any(one is None for found in digests.values() for one in found):
        return None
    for arm, found in digests.items():
        if list(found) != list(first):
            raise ProtocolError(
                f"claim of {part.slug}: arm '{arm}' was trained on other data than the others; let no arm change the data"
            )
    if len(first) > 1 and len(set(first)) < len(first):
        raise ProtocolError(
            f"claim of {part.slug}: '{part.data}' is the same for different seeds; draw a part of it (such as train=600)"
        )
    return True


def _tuned(
    slug: str,
    part: Protocol,
    jobs: int | None,
    where: Path,
    stamp: str,
    title: str,
    console: Console | None,
    run_one: RunOne,
    cluster: Cluster | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Choose a grid point for every arm, by its mean figure on `valid` over the pilot seeds."""
    tuning = part.tuning
    assert tuning is not None
    grid = tuning.points()
    done = runner.run_all(
        {
            f"{re_named(arm)}-{number}-{seed}": (
                slug, part.data, part.options(seed), part.settings(arm, point), seed, False,
            )
            for number, point in enumerate(grid)
            for seed in tuning.seeds
            for arm in part.arms
        },
        run_one,
        cache=where,
        stamp=stamp,
        jobs=jobs,
        title=f"{title}: tuning on pilot seeds",
        console=console,
        cluster=cluster,
    )  # fmt: skip
    chosen, scores = {}, {}
    sign = 1 if tuning.direction == "higher" else -1
    name = f"valid_{tuning.metric}"
    for arm in part.arms:
        means = []
        for number in range(len(grid)):
            runs = [done[f"{re_named(arm)}-{number}-{seed}"] for seed in tuning.seeds]
            if any(name not in found for found in runs):
                raise ProtocolError(
                    f"claim of {slug}: tuning needs 'valid/{tuning.metric}', which arm '{arm}' lacks; tune by another metric"
                )
            means.append(sum(float(found[name]) for found in runs) / len(runs))
        best = max(zip(means, range(len(grid)), strict=True), key=lambda pair: sign * pair[0])[1]
        chosen[arm], scores[arm] = grid[best], means
    said = {"metric": tuning.metric, "seeds": list(tuning.seeds), "grid": grid, "valid": scores, "chosen": chosen}
    return chosen, said


def rehearse(slug: str, part: Protocol, arm: str, seed: int = 0) -> dict[str, Any]:
    """Run one arm of a claim or variant in its smaller setting. Return its figures."""
    settings = part.settings(arm, quick=True)
    return runner.run_one(slug, part.data, part.options(seed, quick=True), settings, seed, False)


def missing(record: Mapping[str, Any]) -> list[str]:
    """List the rules of the protocol that a record's figures do not meet, as sentences."""
    found = []
    if record.get("data_redrawn") is not True:
        why = "unknown whether the data were redrawn" if record.get("data_redrawn") is None else "data were not redrawn"
        found.append(f"{why} by seed; needs a new run")
    for one in record.get("conjuncts", ()):
        if one.get("refused"):
            found.append(f"'{one['says']}' is not judged: {one['refused']}")
    if len(record.get("seeds", ())) < LEAST_SEEDS:
        found.append(f"fewer than {LEAST_SEEDS} seeds")
    commit = record.get("commit")
    if commit is None:
        found.append("the figures have no commit, and the test split was watched while they were made; needs a new run")
    elif commit["dirty"]:
        found.append("the code that made the figures differed from its commit; needs a new run")
    return found


def write(record: Mapping[str, Any], path: Path) -> None:
    """Write a record as JSON, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def read_record(slug: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Read the record of a verified claim. CounterpointError when there is none."""
    file = folder / f"{slug}.json"
    if not file.is_file():
        if slug not in catalog.entries():
            raise unknown("system", slug, catalog.entries())
        raise CounterpointError(f"no record of {slug} in {folder}/; make one: counterpoint verify {slug}")
    return dict(json.loads(file.read_text()))
