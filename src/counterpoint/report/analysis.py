"""Write the page of a sweep over temperatures, and the table and the drawing of all claims."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.report import figures
from counterpoint.report import page as parts
from counterpoint.report.claim import by_unit, label, rule_said
from counterpoint.report.page import Page, number
from counterpoint.words import counted

SAID = {
    "embedding_uniformity": "uniformity of what the loss compares (lower: more evenly spread)",
    "embedding_tolerance": "tolerance: cosine of two examples of one class",
    "knn_accuracy": "k-NN accuracy of features",
    "linear_accuracy": "linear accuracy of features",
}


def write_sweep_report(record: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a sweep's record (see `counterpoint.lab.sweep`). Return `path`."""
    count = len(record["seeds"])
    page = Page(
        f"{record['slug']} over the temperature",
        f"{record['data']}, {counted(count, 'seed')} at each of {len(record['temperatures'])} temperatures",
    )
    grid = np.log10(np.asarray(record["temperatures"], float))
    mean = {name: np.mean(np.asarray(rows, float), axis=1) for name, rows in record["measures"].items()}
    for heading, names in (
        ("Uniformity", ["embedding_uniformity"]),
        ("Tolerance", ["embedding_tolerance"]),
        ("Accuracy", ["knn_accuracy", "linear_accuracy"]),
    ):
        series = {SAID[name]: (grid, mean[name]) for name in names if name in mean}
        if series:
            drawn = figures.curves(series, title=heading, xlabel="log10 of the temperature")
            page.section(heading, parts.figure(drawn), anchor=heading.lower())
    rows = [[f"{t:.12g}", *(mean[name][n] for name in mean)] for n, t in enumerate(record["temperatures"])]
    page.section("Figures", parts.table(["temperature", *mean], rows), anchor="figures")
    again = (
        f"counterpoint analyse {shlex.quote(record['path'])} --temperature-sweep --seeds {count} "
        f"--temperatures {' '.join(f'{t:.12g}' for t in record['temperatures'])}"
    )
    page.section(
        "Do it again",
        parts.join(parts.command(again), parts.pairs(record["versions"]), parts.pairs(record["machine"])),
        anchor="again",
    )
    return page.write(path)


def claims_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return all claims as a Markdown table: a row for each conjunct, with the claim's verdict in its first row."""
    lines = [
        "| system | kind | claim | part of it | measure | test | gain | interval (Holm) | detectable | part |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for row_number, row in enumerate(record["conjuncts"]):
            first = row_number == 0
            seeds = counted(len(record["seeds"]), "seed")
            cells = [
                f"`{record['slug']}`" if first else "",
                record["kind"] if first else "",
                f"**{record['verdict']}**, {seeds}" if first else "",
                str(row["says"]).replace("|", "/"),
                row["metric"].replace("_", " "),
                rule_said(row),
                *_effect_cells(row),
                row["verdict"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _effect_cells(row: Mapping[str, Any]) -> list[str]:
    if row.get("refused"):
        return ["-", "-", "-"]
    interval = "-" if row["low"] is None else f"{row['low']:+.3f} .. {row['high']:+.3f}"  # one seed has none
    found = row.get("detectable")
    return [f"{row['mean']:+.3f}", interval, "-" if found is None else f"{found:.3f}"]


def claims_drawing(records: Sequence[Mapping[str, Any]]) -> str:
    """Draw all conjuncts of all claims as effects with intervals, a panel for each unit. Return a complete SVG file."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = {"holds": "#1a7f37", "reversed": "#cf222e", "smaller": "#9a6700"}
    panels = by_unit([{**row, "slug": record["slug"]} for record in records for row in record["conjuncts"]])
    heights = [0.9 + 0.24 * len(rows) for rows in panels.values()]
    drawn = Figure(figsize=(8.6, sum(heights)), layout="constrained")
    FigureCanvasSVG(drawn)
    frames = drawn.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (unit, rows) in zip(frames, panels.items(), strict=True):
        widest = max(abs(v) for row in rows for v in (row["mean"], row["low"], row["high"]) if v is not None)
        for place, row in enumerate(rows):
            colour = colours.get(str(row["verdict"]), "#57606a")
            low, high = (row["mean"] if row[end] is None else row[end] for end in ("low", "high"))
            axes.plot([low, high], [place, place], color=colour, lw=2, solid_capstyle="butt")
            axes.plot([row["mean"]], [place], "o", color=colour, ms=4)
            for margin in figures.margins(row):
                axes.plot([margin, margin], [place - 0.35, place + 0.35], color="#0969da", ls=":", lw=1.3)
            said = number(row["mean"], sign=True)
            axes.annotate(
                said, (high, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7, color=colour
            )
        axes.axvline(0, color="#8c959f", lw=1)
        names = [f"{row['slug']}:  {label(row)}" for row in rows]
        names = [
            name if names.count(name) == 1 else f"{name}, {row['metric'].replace('_', ' ')}"
            for name, row in zip(names, rows, strict=True)
        ]
        axes.set_yticks(range(len(rows)), names, fontsize=7.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        if widest > 0.3 and len(rows) > 4:  # small effects beside large ones
            axes.set_xscale("symlog", linthresh=0.05)
            ticks = [-0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1]
            axes.set_xticks(ticks, [f"{t:+g}" if t else "0" for t in ticks])
            axes.minorticks_off()
        axes.margins(x=0.12)
        axes.tick_params(axis="x", labelsize=7.5)
        axes.set_title(f"gain in {unit}", fontsize=9, loc="left")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color="#d0d7de", lw=0.5)
        axes.set_axisbelow(True)
    drawn.supxlabel("gain over the baseline; bars: intervals at Holm's level; dotted: margins", fontsize=8.5)
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "claims"}):  # the same records give the same file
        drawn.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
