"""`counterpoint sweep SLUG --over NAME=RANGE ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from counterpoint.commands.common import HERE, Count, Machines, Place, Text, console, say, settings_said, table, unset


def main(
    slug: Annotated[Positional[str], arg(metavar="SLUG")],
    *,
    over: Annotated[tuple[str, ...], arg(metavar="NAME=RANGE [NAME=RANGE ...]")],
    data: Annotated[Text, unset(metavar="SOURCE")] = None,
    trials: int = 20,
    settings: Annotated[tuple[str, ...], unset(name="set", metavar="NAME=VALUE [NAME=VALUE ...]")] = (),
    metric: Annotated[Text, unset(metavar="NAME")] = None,
    sampler: Literal["tpe", "random", "grid", "cmaes"] = "tpe",
    pruner: Literal["median", "halving", "none"] = "median",
    seed: int = 0,
    jobs: Annotated[Count, unset(aliases=["--workers"], metavar="INT")] = None,
    keep: bool = False,
    out: Annotated[Place, unset(metavar="DIR")] = None,
    machines: OmitArgPrefixes[Machines] = HERE,
) -> int:
    """Search a system's settings with Optuna: trials are judged on `valid`, and the best is measured on `test`.

    The same command continues an interrupted sweep. It writes a page with the best settings, the importance of each setting, and
    the command that trains with them.

    Example: counterpoint sweep simclr --data imagefolder:photos --over lr=1e-3..1:log temperature=0.05..0.5 --set epochs=20

    Example: counterpoint sweep clip --data manifest:mine.csv --over batch_size=64,128,256 lr=1e-4..1e-2:log --trials 30 --jobs 2

    Args:
        slug: The system, as `counterpoint systems` lists it.
        over: Settings to search: NAME=LOW..HIGH, NAME=LOW..HIGH:log, or NAME=A,B,C. Whole numbers stay whole.
        data: The data source. Default: the system's own.
        trials: Number of trials of the whole sweep, at least 1.
        settings: Other settings, the same in all trials, such as epochs=20.
        metric: The measure on `valid`. Default: the headline of the system's task. Losses and errors are minimised, other measures
            maximised.
        sampler: tpe, random, grid (five points of each interval), or cmaes (needs the package cmaes).
        pruner: median ends trials below the median of the others at the same epoch; halving; none.
        seed: Seed of the sampler and of every trial.
        jobs: Number of trials at a time, with one thread each where there are several; at least 1. Default: 1, on Ray all
            that there is room for.
        machines: Where the trials take place.
        keep: Keep the run directories of all trials. Default: of the best one.
        out: The folder. Default: sweeps/SLUG.
    """
    from counterpoint.tuning import PAGE, sweep

    record = sweep(
        slug,
        data,
        over,
        trials=trials,
        given=settings_said(settings),
        metric=metric,
        sampler=sampler,
        pruner=pruner,
        seed=seed,
        jobs=machines.jobs(jobs, 1),
        cluster=machines.cluster(),
        keep=keep,
        out=out,
        say=say,
    )
    best = record["best"]
    shown = table("setting", "best", "importance", right=("importance",), title=f"trial {best['trial']}")
    for name, value in best["settings"].items():
        share = record["importances"].get(name)
        shown.add_row(
            name, f"{value:.4g}" if isinstance(value, float) else str(value), "-" if share is None else f"{share:.2f}"
        )
    console().print(shown)
    measured = best["test"].get(f"test/{record['metric']}")
    say(f"{record['metric']} {best['valid']:.4f} on valid" + ("" if measured is None else f", {measured:.4f} on test"))
    say(f"Run: {best['run']}  Page: {Path(best['run']).parents[1] / PAGE}")
    say(record["command"])
    return 0
