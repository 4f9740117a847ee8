"""The page of a claim: the effect with its interval, every seed, the setting, and the variants beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from counterpoint.report import figures
from counterpoint.report import page as parts
from counterpoint.report.page import Page, number

_CLASSES = {"holds": "holds", "reversed": "reversed"}


def write_claim_report(record: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a claim's record (see `counterpoint.verify`). Returns `path`."""
    slug = str(record.get("slug", "claim"))
    page = Page(f"Does the claim of {slug} hold?", str(record.get("title") or ""))
    claim_section(page, record)
    again = f"counterpoint verify {parts.quoted(slug)} --seeds {max(1, len(record.get('seeds', ())))}"
    page.section(
        "Do it again",
        parts.join(
            parts.command(again + (" --quick" if record.get("quick") else "")),
            parts.pairs(record.get("versions") or {}, caption="Versions"),
            parts.pairs(record.get("machine") or {}, caption="Machine"),
        ),
        anchor="again",
    )
    return page.write(path)


def write_comparison_report(record: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a comparison's record (see `counterpoint.compare`). Returns `path`."""
    arms = list(record["results"])
    page = Page(f"{', '.join(arms)} on {record['data']}", f"{len(record['seeds'])} seeds each, by {record['metric']}")
    page.section("Outcome", _claim(record), anchor="outcome")
    page.section("Every seed", _seeds(record), anchor="seeds")
    page.section("Setting", _setting(record), anchor="setting")
    again = f"counterpoint compare {' '.join(map(parts.quoted, arms))} --data {parts.quoted(record['data'])}"
    page.section(
        "Do it again",
        parts.join(
            parts.command(
                " ".join(
                    [
                        f"{again} --seeds {len(record['seeds'])}",
                        *(
                            f"--{name.replace('_', '-')} {parts.quoted(str(value))}"
                            for name, value in (record.get("options") or {}).items()
                        ),
                    ]
                )
            ),
            parts.pairs(record["versions"], caption="Versions"),
            parts.pairs(record["machine"], caption="Machine"),
        ),
        anchor="again",
    )
    return page.write(path)


def claim_section(page: Page, record: Mapping[str, Any]) -> None:
    """Add the sections of a claim's record, and of its variants."""
    page.section("The claim", _claim(record), anchor="claim")
    page.section("Every seed", _seeds(record), anchor="seeds")
    page.section("Setting", _setting(record), anchor="setting")
    for name, variant in (record.get("variants") or {}).items():
        html = parts.join(
            _claim(variant), Markup("<h3>Every seed</h3>"), _seeds(variant), parts.details("Setting", _setting(variant))
        )
        page.section(f"Variant: {name}", html)


def _verdict(said: str) -> Markup:
    return Markup('<span class="verdict {}">{}</span>').format(_CLASSES.get(said, "undecided"), said)


def _interval(comparison: Mapping[str, Any]) -> str:
    low, high = comparison.get("low"), comparison.get("high")
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return parts.DASH
    return f"{number(low, sign=True)} to {number(high, sign=True)}"


def _claim(record: Mapping[str, Any]) -> Markup:
    comparisons = [_cleaned(c) for c in record.get("comparisons") or ()]
    several = len({c.get("metric") for c in comparisons}) > 1
    for c in comparisons:
        names = (c["baseline"], c["arm"]) if c.get("lower") else (c["arm"], c["baseline"])
        c["label"] = " − ".join(names) + (f", {c['metric']}" if several else "")
    html = [Markup("<blockquote>{}</blockquote>").format(record.get("claim", ""))]
    if record.get("verdict"):
        html.append(Markup("<p>Verdict: {}</p>").format(_verdict(str(record["verdict"]))))
    if record.get("quick"):
        html.append(parts.notes([f"Quick: {record['quick']}"]))
    if comparisons:
        metric = "the metric named" if several else str(comparisons[0].get("metric") or record.get("metric", ""))
        kinds = dict.fromkeys(str(c["interval"]) for c in comparisons if c.get("interval") and c["low"] is not None)
        caption = "Diamonds: mean over the seeds; small dots: one seed each." + (
            f" Bars: {'; '.join(kinds)}." if kinds else " No interval: it takes at least two seeds."
        )
        html.append(parts.figure(figures.effects(comparisons, metric=metric), caption))
        expected = any(c.get("expected") is not None for c in comparisons)
        heads = ["comparison", "mean difference", "interval", *(["expected at least"] if expected else []), "verdict"]
        rows = []
        for c in comparisons:
            row = [c["label"], number(c["mean"], sign=True), _interval(c)]
            if expected:
                aim = c.get("expected")
                reached = "" if not aim else " (reached)" if c.get("reaches_expected") else " (not reached)"
                row.append(number(aim, sign=True) + reached if aim else parts.DASH)
            rows.append([*row, _verdict(str(c.get("verdict", "")))])
        html.append(parts.table(heads, rows, caption=f"Paired differences in {metric}"))
    else:
        html.append(parts.text("The record holds no comparison."))
    html.append(parts.notes([str(note) for note in record.get("notes") or ()]))
    return parts.join(*html)


def _cleaned(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """With NaN as None, the way JSON says it."""

    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and math.isnan(value) else value

    return {
        "low": None,
        "high": None,
        "mean": None,
        **{k: [clean(v) for v in v_] if isinstance(v_, list) else clean(v_) for k, v_ in comparison.items()},
    }


def _seeds(record: Mapping[str, Any]) -> Markup:
    metric = str(record.get("metric", ""))
    others = [m for m in record.get("metrics") or () if m != metric]
    html = [_per_seed(record, metric)]
    if others:
        html.append(parts.details("Other metrics", parts.join(*(_per_seed(record, m) for m in others))))
    return parts.join(*html)


def _per_seed(record: Mapping[str, Any], metric: str) -> Markup:
    results: Mapping[str, Any] = record.get("results") or {}
    seeds = record.get("seeds") or sorted({s for arm in results.values() for s in arm}, key=str)

    def value(arm: str, seed: Any) -> float | None:
        return (results[arm].get(str(seed)) or {}).get(metric)

    rows = [[f"seed {seed}", *(value(arm, seed) for arm in results)] for seed in seeds]
    mean: list[Any] = ["mean"]
    for arm in results:
        there = [v for v in (value(arm, seed) for seed in seeds) if v is not None and not math.isnan(v)]
        mean.append(float(np.mean(there)) if there else None)
    return parts.table(["", *results], rows, caption=metric, foot=mean if len(seeds) > 1 else None)


def _setting(record: Mapping[str, Any]) -> Markup:
    shared = {"data": record["data"]} if record.get("data") else {}
    arms = {
        arm: ", ".join(f"{k} {parts.plain(v)}" for k, v in overrides.items()) or parts.DASH
        for arm, overrides in (record.get("arms") or {}).items()
    }
    return parts.join(
        parts.pairs(shared | dict(record.get("setting") or {}), caption="The same for all arms"),
        parts.pairs(arms, caption=f"What the arms differ in; the baseline is {record.get('baseline', parts.DASH)}"),
    )
