"""Pages that are about no single run's figures: the sweep over temperatures, and all claims together."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.report import figures
from counterpoint.report import page as parts
from counterpoint.report.page import Page, number

SAID = {
    "embedding_uniformity": "uniformity of what the loss compares (lower: more evenly spread)",
    "embedding_tolerance": "tolerance: cosine of two examples of one class",
    "knn_accuracy": "k-NN accuracy of features",
    "linear_accuracy": "linear accuracy of features",
}


def write_sweep_report(record: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a sweep's record (see `counterpoint.analyse`). Returns `path`."""
    count = len(record["seeds"])
    page = Page(
        f"{record['slug']} over the temperature",
        f"{record['data']}, {count} seed{'s' * (count > 1)} at each of {len(record['temperatures'])} temperatures",
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


def first_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison a claim's verdict is about."""
    return dict(record["comparisons"][0])


def claims_table(records: Sequence[Mapping[str, Any]]) -> str:
    """All claims as a Markdown table, one row each."""
    lines = [
        "| system | arm | against | measure | mean gain | 95 % interval | seeds | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        pair = first_of(record)
        measure = pair.get("metric", record["metric"]).removesuffix("_last").removesuffix("_last3").replace("_", " ")
        measure += " (less is better)" if pair.get("lower") else ""
        interval = "-" if pair["low"] is None else f"{pair['low']:+.3f} .. {pair['high']:+.3f}"  # one seed has none
        lines.append(
            f"| `{record['slug']}` | {pair['arm']} | {pair['baseline']} | {measure} | {pair['mean']:+.3f} "
            f"| {interval} | {len(record['seeds'])} | {record['verdict']} |"
        )
    return "\n".join(lines)


def claims_drawing(records: Sequence[Mapping[str, Any]]) -> str:
    """All claims as a drawing of their effects with intervals, a whole SVG file."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = {"holds": "#1a7f37", "reversed": "#cf222e"}
    drawn = Figure(figsize=(8.0, 0.9 + 0.32 * len(records)), layout="constrained")
    FigureCanvasSVG(drawn)
    axes = drawn.add_subplot()
    for row, record in enumerate(records):
        pair = first_of(record)
        colour = colours.get(record["verdict"], "#57606a")
        low, high = (pair["mean"] if pair[end] is None else pair[end] for end in ("low", "high"))
        axes.plot([low, high], [row, row], color=colour, lw=2, solid_capstyle="butt")
        axes.plot([pair["mean"]], [row], "o", color=colour, ms=5)
        axes.annotate(
            f"{number(pair['mean'], sign=True)}", (high, row), xytext=(6, 0), textcoords="offset points", va="center",
            fontsize=8, color=colour,
        )  # fmt: skip
    axes.axvline(0, color="#8c959f", lw=1)
    axes.set_yticks(range(len(records)), [f"{record['slug']}" for record in records], fontsize=9)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=0.05)
    ticks = [-0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1]
    axes.set_xticks(ticks, [f"{t:+g}" if t else "0" for t in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("gain over the baseline in the claim's own measure, 95 % paired interval", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#d0d7de", lw=0.5)
    axes.set_axisbelow(True)
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "claims"}):  # the same records give the same file
        drawn.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
