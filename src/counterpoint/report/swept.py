"""Write the page of a sweep: the best settings, the trials in order, the importance of each setting, values against the measure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.report import figures
from counterpoint.report import page as parts
from counterpoint.report.page import Page
from counterpoint.words import counted


def write_sweep_page(path: Path, record: Mapping[str, Any]) -> Path:
    """Write the page of a sweep's record (see `counterpoint.tuning`) and return its path."""
    best, metric, lower = record["best"], record["metric"], record["lower_is_better"]
    done = [row for row in record["trials"] if row["state"] == "complete"]
    ended = len(record["trials"]) - len(done)
    page = Page(
        f"Sweep of {record['slug']}",
        f"{counted(len(done), 'trial')} on {record['data']}, judged by {metric} on valid; {ended} more were ended early.",
    )
    test = best["test"].get(f"test/{metric}")
    shown = [
        (metric + " on valid", parts.number(best["valid"]), f"trial {best['trial']}"),
        *([(metric + " on test", parts.number(test), "measured once")] if test is not None else []),
    ]
    page.section(
        "Best",
        parts.join(parts.stats(shown), parts.pairs(best["settings"]), parts.command(record["command"])),
        anchor="best",
    )
    numbers = np.array([row["trial"] for row in done], float)
    values = np.array([row["valid"] for row in done], float)
    so_far = (np.minimum if lower else np.maximum).accumulate(values)
    drawn = figures.curves({"trial": (numbers, values), "best so far": (numbers, so_far)}, title=metric, xlabel="trial")
    page.section("Trials in order", parts.figure(drawn), anchor="order")
    if record["importances"]:
        caption = "Share of each setting in the variance of the measure over the trials (fANOVA)."
        rows = list(record["importances"].items())
        page.section("Importance", parts.table(["setting", "share"], rows, caption=caption), anchor="importance")
    drawings = []
    for one in record["over"]:
        name = one["name"]
        at = [row["settings"][name] for row in done]
        points: dict[str, list[tuple[float, Any]]]
        if one["choices"]:
            points = {
                str(c): [(n, v) for n, (a, v) in enumerate(zip(at, values, strict=True)) if a == c]
                for c in one["choices"]
            }
            axes = ("trial", metric)
        else:
            log = bool(one["log"])
            points = {name: [(math.log10(a) if log else float(a), v) for a, v in zip(at, values, strict=True)]}
            axes = (f"log10 of {name}" if log else name, metric)
        arrays = {key: np.asarray(rows, float).reshape(-1, 2) for key, rows in points.items() if rows}
        drawings.append(parts.figure(figures.scatter(arrays, axes=axes), name))
    page.section("Values", parts.figures(*drawings), anchor="values")
    names = [one["name"] for one in record["over"]]
    order = sorted(record["trials"], key=lambda row: _rank(row, lower))
    rows = [
        [
            row["trial"],
            row["state"],
            "" if row["valid"] is None else row["valid"],
            *(row["settings"].get(n, "") for n in names),
        ]
        for row in order
    ]
    page.section("All trials", parts.table(["trial", "state", metric, *names], rows), anchor="trials")
    page.section(
        "Made with", parts.join(parts.pairs(record["versions"]), parts.pairs(record["machine"])), anchor="made"
    )
    return page.write(path)


def _rank(row: Mapping[str, Any], lower: bool) -> tuple[int, float]:
    if row["state"] != "complete":
        return 1, float(row["trial"])
    return 0, row["valid"] if lower else -row["valid"]
