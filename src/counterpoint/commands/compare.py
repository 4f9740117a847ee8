"""`counterpoint compare SLUG SLUG ... --data SOURCE`."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from counterpoint.commands.common import (
    COMPARISONS,
    HERE,
    Count,
    Machines,
    Text,
    console,
    say,
    settings_said,
    signed,
    table,
    unset,
)
from counterpoint.words import counted


def main(
    slugs: Annotated[Positional[tuple[str, ...]], unset(metavar="SLUG SLUG [SLUG ...]")],
    *,
    data: Annotated[str, arg(metavar="SOURCE")],
    seeds: int = 3,
    epochs: Annotated[Count, unset(metavar="INT")] = None,
    batch_size: Annotated[Count, unset(metavar="INT")] = None,
    settings: Annotated[tuple[str, ...], unset(name="set", metavar="NAME=VALUE [NAME=VALUE ...]")] = (),
    metric: Annotated[Text, unset(metavar="NAME")] = None,
    leave_one_domain_out: bool = False,
    jobs: Annotated[Count, unset(aliases=["--workers"], metavar="INT")] = None,
    out: Annotated[Path, arg(metavar="DIR")] = COMPARISONS,
    machines: OmitArgPrefixes[Machines] = HERE,
) -> int:
    """Compare several systems on one data source, on the same seeds: paired differences, 95 % intervals, a page.

    Each difference is against the first system. Finished runs are kept, so an interrupted comparison continues.

    Example: counterpoint compare simclr dcl moco-v2 --data digits --epochs 20

    Example: counterpoint compare kd crd rkd --data imagefolder:photos --set teacher=runs/big encoder=timm:resnet18

    Example: counterpoint compare kd vl2v-adip --data 'imagefolder:mine?domain=folder' --leave-one-domain-out

    Args:
        slugs: At least two systems, as `counterpoint systems` lists them.
        data: The data source: NAME, NAME:PLACE or NAME?OPTION=VALUE (see `counterpoint data`).
        seeds: Number of seeds, from 0 on; at least 1.
        epochs: Number of epochs for all systems. Default: each system's own number for this data.
        batch_size: Examples a step for all systems. Default: each system's own number for this data.
        settings: Further settings of all systems, such as one teacher for several students; a system that lacks one leaves it out.
        metric: The metric to compare. Default: the task's headline metric, after the last epoch.
        leave_one_domain_out: Leave each domain of the data out in turn, measure on it, and average over the domains. A seed
            then has a run for each domain.
        jobs: Number of runs at a time, one thread each; at least 1. Default: 2, on Ray all that there is room for.
        machines: Where the runs take place.
        out: The folder of the record and the page.
    """
    from counterpoint.lab import compare as room
    from counterpoint.report.claim import write_comparison_report

    overrides = settings_said(settings, epochs=epochs, batch_size=batch_size)
    record = room.compare(
        slugs,
        data,
        seeds=seeds,
        jobs=machines.jobs(jobs, 2),
        cluster=machines.cluster(),
        out=out,
        metric=metric,
        overrides=overrides,
        leave_one_domain_out=leave_one_domain_out,
    )
    name = record["metric"]
    columns = ("system", "mean", "std", f"against {slugs[0]}", "95 % interval", "", "minutes a run")
    shown = table(*columns, right=columns[1:], title=f"{name} on {data}, {counted(seeds, 'seed')}")
    pairs = {pair["arm"]: pair for pair in record["comparisons"]}
    for slug, runs in record["results"].items():
        values = [run[name] for run in runs.values()]
        spread = stdev(values) if len(values) > 1 else 0.0
        minutes = fmean(run["seconds"] for run in runs.values()) / 60
        against, interval, verdict = "", "", ""
        if pair := pairs.get(slug):
            against, verdict = f"{pair['mean']:+.4f}", pair["verdict"]
            interval = signed(pair["low"], pair["high"])
        shown.add_row(slug, f"{fmean(values):.4f}", f"{spread:.4f}", against, interval, verdict, f"{minutes:.1f}")
    console().print(shown)
    if domains := record.get("domains"):
        apart = table("left out", *slugs, right=slugs, title=f"{name} by domain, mean of {counted(seeds, 'seed')}")
        for domain, systems in domains.items():
            apart.add_row(domain, *(f"{fmean(systems[slug].values()):.4f}" for slug in slugs))
        console().print(apart)
    for note in record["notes"]:
        say(f"note: {note}")
    page = write_comparison_report(record, out / f"{record['name']}.html")
    say(f"Record: {out / record['name']}.json  Page: {page}")
    return 0
