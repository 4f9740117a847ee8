"""Make the parts of the documentation that come from the records under results/: speed against others, and verdicts of claims."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from counterpoint import catalog
from counterpoint.report.figures import svg

ROOT = Path(__file__).parents[1]
# Names of numbers that tell how many times as fast ours is (see benchmarks/check.py).
RATIO = re.compile(r"ratio|times_faster|times_ours|.*times_faster_than.*")
OTHERS = ("plain", "transcription", "theirs", "peer", "loop", "authors")


def speeds(record: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, str, float, dict[str, Any]]]:
    """Yield (case, name of the number, number, the row it stands in) of each ratio of a record."""
    if isinstance(record, dict):
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and RATIO.fullmatch(name):
                yield " / ".join(at) or name, name, float(value), record
            else:
                yield from speeds(value, (*at, name) if isinstance(value, dict) and name != "cases" else at)
    elif isinstance(record, list):
        for row in record:
            if isinstance(row, dict):
                known = [f"{k} {v}" for k, v in row.items() if isinstance(v, str | int) and not isinstance(v, bool)]
                yield from speeds(row, (*at, ", ".join(known)))


def _pair(row: dict[str, Any], ending: str) -> str:
    """Return ours and the other side's number of a row, such as seconds."""
    for unit, last, factor in (("s", "ms", 1e-3), ("megabytes", "extra_mb", 1.0)):
        its = next((row[f"{name}_{last}"] for name in OTHERS if f"{name}_{last}" in row), None)
        if ending == unit and f"our_{last}" in row and its is not None:
            return f"{row[f'our_{last}'] * factor:.3g} / {its * factor:.3g}"
    ours = row.get(f"ours_{ending}")
    other = next((row[f"{name}_{ending}"] for name in OTHERS if f"{name}_{ending}" in row), None)
    return "" if ours is None or other is None else f"{ours:.3g} / {other:.3g}"


def performance() -> str:
    """Return the page of all benchmarks: a drawing, and a table for each record."""
    records = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((ROOT / "results/bench").glob("*.json"))
    }
    found = {name: list(speeds(record)) for name, record in records.items()}
    found = {name: rows for name, rows in found.items() if rows}
    parts = [
        "# Performance",
        "Each row is one measurement of `make bench`: our way and another way of one computation, in turn, in one run. A ratio "
        "above 1 means that ours is faster. The other way is a named library, or the authors' formulation, written by us for the "
        "comparison. `benchmarks/NAME.py` says which. All were measured on a CPU with one or two threads. Nothing is measured on a "
        "GPU yet.",
        "Small inputs are often slower than the other way: checks of arguments cost some tenths of a millisecond.",
        f'<figure class="effects">{_drawn(found)}</figure>',
    ]
    for name, rows in found.items():
        record = records[name]
        facts = [f"{key} {record[key]}" for key in ("threads", "rounds") if key in record]
        parts += [f"## {name}", f"{record.get('what', '')} {', '.join(facts)}".strip()]
        table = ["| case | ratio | seconds, ours / other | megabytes, ours / other |", "|---|---|---|---|"]
        for case, _, ratio, row in rows:
            table.append(f"| {case.replace('|', '/')} | {ratio:.2f} | {_pair(row, 's')} | {_pair(row, 'megabytes')} |")
        parts.append("\n".join(table))
    return "\n\n".join(parts)


def _drawn(found: dict[str, list[tuple[str, str, float, dict[str, Any]]]]) -> str:
    """Draw every ratio as a point, on a logarithmic axis; a row for each record."""
    figure = Figure(figsize=(7, 0.22 * len(found) + 0.8), layout="constrained")
    axes = figure.subplots()
    for n, rows in enumerate(found.values()):
        values = [ratio for _, _, ratio, _ in rows]
        axes.plot([min(values), max(values)], [n, n], linewidth=0.6, color="0.6")
        axes.plot(values, [n] * len(values), "o", markersize=3)
    axes.axvline(1, linewidth=0.8, color="0.4")
    axes.set_xscale("log")
    axes.set_yticks(range(len(found)), list(found), fontsize=7)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("times as fast as the other way")
    return str(svg(figure, "All ratios of all benchmarks; above 1, ours is faster"))


# --- claims


def verdicts(slugs: Sequence[str]) -> str:
    """Return a table of systems: the sentence that was tested, its verdict, and the gain of its first part.

    Raises KeyError for a system that the catalogue lacks.
    """
    rows = ["| system | what was tested | verdict | first part: gain, interval |", "|---|---|---|---|"]
    for slug in slugs:
        entry = catalog.entries()[slug]
        file = ROOT / "results" / "claims" / f"{slug}.json"
        name = f"[{slug}](../systems/{slug}.md)" if entry.state == "done" else f"`{slug}`"
        if not file.is_file():
            rows.append(f"| {name} | {entry.title} | baseline, or not run | |")
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        first = record["conjuncts"][0]
        gain = "" if first.get("mean") is None else f"{first['mean']:+.3f}"
        if gain and first.get("low") is not None and first.get("high") is not None:
            gain += f" ({first['low']:+.3f} .. {first['high']:+.3f})"
        rows.append(f"| {name} | {record['claim']} | **{record['verdict']}** | `{first['metric']}` {gain} |")
    return "\n".join(rows)


def with_verdicts(markdown: str) -> str:
    """Replace each line `<!-- verdicts: SLUG SLUG ... -->` of a page by its table."""
    return re.sub(r"<!-- verdicts: (.+?) -->", lambda match: verdicts(match[1].split()), markdown)
