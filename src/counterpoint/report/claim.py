"""Write the page of a claim: each conjunct's effect with its interval, every seed, the setting, and the variants."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup

from counterpoint.files import quoted
from counterpoint.report import figures
from counterpoint.report import page as parts
from counterpoint.report.page import Page, number
from counterpoint.words import counted

_CLASSES = {"holds": "holds", "reversed": "reversed", "better": "holds", "worse": "reversed"}


def write_claim_report(record: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a claim's record (see `counterpoint.lab.verify`). Return `path`."""
    slug = str(record.get("slug", "claim"))
    page = Page(f"Does the claim of {slug} hold?", str(record.get("title") or ""))
    claim_section(page, record)
    again = f"counterpoint verify {quoted(slug)} --seeds {max(1, len(record.get('seeds', ())))}"
    page.section(
        "Do it again",
        parts.join(
            parts.command(again + (" --quick" if record.get("quick") else "")),
            parts.pairs(_origin(record), caption="Origin"),
            parts.pairs(record.get("versions") or {}, caption="Versions"),
            parts.pairs(record.get("machine") or {}, caption="Machine"),
        ),
        anchor="again",
    )
    return page.write(path)


def _origin(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the protocol and the commit of a record, as names and values."""
    protocol, commit = record.get("protocol") or {}, record.get("commit")
    found = {"protocol, SHA-256": protocol.get("sha256") or parts.DASH}
    if protocol and protocol.get("ran") != protocol.get("sha256"):
        found["protocol of the runs, SHA-256"] = protocol.get("ran") or "none: older than all protocols"
    found["commit"] = parts.DASH if not commit else commit["id"] + (" and changes" if commit["dirty"] else "")
    if record.get("minutes") is not None:
        found["processor minutes"] = f"{record['minutes']:.1f}"
    return found


def write_comparison_report(record: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a comparison's record (see `counterpoint.lab.compare`). Return `path`."""
    arms = list(record["results"])
    page = Page(
        f"{', '.join(arms)} on {record['data']}", f"{counted(len(record['seeds']), 'seed')} each, by {record['metric']}"
    )
    comparison_sections(page, record)
    return page.write(path)


def comparison_sections(page: Page, record: Mapping[str, Any]) -> None:
    """Add the sections of a comparison's record."""
    page.section("Outcome", _claim(record), anchor="outcome")
    page.section("Every seed", _seeds(record), anchor="seeds")
    if record.get("domains"):
        page.section("Every domain", _domains(record), anchor="domains")
    page.section("Setting", _setting(record), anchor="setting")
    page.section(
        "Do it again",
        parts.join(
            parts.command(_comparison_again(record)),
            parts.pairs(record["versions"], caption="Versions"),
            parts.pairs(record["machine"], caption="Machine"),
        ),
        anchor="again",
    )


def _comparison_again(record: Mapping[str, Any]) -> str:
    """Return the command that repeats a comparison."""
    slugs = " ".join(map(quoted, record["results"]))
    words = [f"counterpoint compare {slugs} --data {quoted(record['data'])} --seeds {len(record['seeds'])}"]
    given = dict(record.get("options") or {})
    for name in ("epochs", "batch_size", "metric"):
        if name in given:
            words.append(f"--{name.replace('_', '-')} {quoted(str(given.pop(name)))}")
    if given:
        # The option --set reads values as YAML, which JSON is.
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
        words.append("--set " + " ".join(quoted(f"{name}={text}") for name, text in texts.items()))
    return " ".join([*words, *(["--leave-one-domain-out"] if record.get("domains") else [])])


def _domains(record: Mapping[str, Any]) -> Markup:
    """Show the figures of each domain that was left out."""
    arms = list(record["results"])
    rows = [
        [domain, *(number(fmean(systems[arm].values())) for arm in arms)]
        for domain, systems in record["domains"].items()
    ]
    caption = (
        f"{record['metric']} on the domain left out, mean over the seeds. A seed's figure is the mean of its column."
    )
    return parts.table(["left out", *arms], rows, caption=caption)


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


def label(row: Mapping[str, Any]) -> str:
    """Return the difference as text, in the order that makes a gain positive: "arm − baseline", or reversed for "lower"."""
    names = (row["baseline"], row["arm"]) if row.get("direction") == "lower" else (row["arm"], row["baseline"])
    return " − ".join(f"({name})" if " - " in name else name for name in names)


def rule_said(row: Mapping[str, Any]) -> str:
    """Return the test of a conjunct as text: the bound that its interval must exceed."""
    margin = row.get("margin") or 0
    if row.get("test") == "non-inferiority":
        return f"not worse: low > −{margin:g}"
    if row.get("test") == "equivalence":
        return f"equal: within ±{margin:g}"
    return f"better: low > {margin:g}"


def _claim(record: Mapping[str, Any]) -> Markup:
    html = [Markup("<blockquote>{}</blockquote>").format(record.get("claim", ""))]
    if record.get("verdict"):
        kind = f" Kind: {record['kind']}." if record.get("kind") else ""
        html.append(Markup("<p>Verdict: {}{}</p>").format(_verdict(str(record["verdict"])), kind))
    if record.get("quick"):
        html.append(parts.notes([f"Quick: {record['quick']}"]))
    conjuncts = [_cleaned(c) for c in record.get("conjuncts") or ()]
    compared = [_cleaned(c) for c in record.get("comparisons") or ()]
    reported = [_cleaned(c) for c in record.get("reported") or ()]
    if not conjuncts and not compared:
        html.append(parts.text("The record holds no comparison."))
    html += _effects([*conjuncts, *compared])
    if conjuncts:
        html.append(_conjuncts(conjuncts))
    if compared:
        rows = [
            [label(c), number(c["mean"], sign=True), _interval(c), _verdict(str(c.get("verdict")))] for c in compared
        ]
        caption = f"Paired differences in {record.get('metric', '')}"
        html.append(parts.table(["comparison", "mean difference", "interval", "verdict"], rows, caption=caption))
    if reported:
        shown = parts.join(*_effects(reported), _reported(reported))
        html.append(parts.details("Reported beside the claim, without a verdict", shown))
    if record.get("missing"):
        html.append(parts.text("What this record lacks to be sound:"))
        html.append(parts.notes([str(one) for one in record["missing"]]))
    html.append(parts.notes([str(note) for note in record.get("notes") or ()]))
    return parts.join(*html)


def by_unit(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group the rows with an effect by the unit of their metric. Each unit gets its own axis."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("mean") is not None:
            found.setdefault(str(row.get("unit") or row.get("metric")), []).append(row)
    return found


def _effects(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Draw the effects, one drawing for each unit."""
    html = []
    for unit, of_unit in by_unit(rows).items():
        several = len({row["metric"] for row in of_unit}) > 1
        drawn = [{**row, "label": label(row) + (f", {row['metric']}" if several else "")} for row in of_unit]
        kinds = dict.fromkeys(str(row["interval"]) for row in of_unit if row.get("interval") and row["low"] is not None)
        caption = "Diamonds: mean over the seeds; small dots: one seed each." + (
            f" Bars: {'; '.join(kinds)}." if kinds else " No interval: it takes at least two seeds."
        )
        if any(row.get("margin") for row in of_unit):
            caption += " Dotted: the margin that the bar must pass."
        html.append(
            parts.figure(figures.effects(drawn, metric=unit if several else str(of_unit[0]["metric"])), caption)
        )
    return html


def _conjuncts(rows: Sequence[Mapping[str, Any]]) -> Markup:
    heads = ["part of the claim", "comparison", "measure", "test", "mean gain", "interval", "p (Holm)", "detectable"]
    body = []
    for row in rows:
        cells: list[Any] = [row.get("says", ""), label(row), row["metric"], rule_said(row)]
        if row.get("refused"):
            cells += [parts.DASH, parts.DASH, parts.DASH, parts.DASH]
        else:
            p, found = row.get("p_holm"), row.get("detectable")
            cells += [
                number(row["mean"], sign=True),
                _interval(row),
                parts.DASH if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001",
            ]
            cells.append(parts.DASH if found is None else number(found))
        body.append([*cells, _verdict(str(row.get("verdict", "")))])
    return parts.table(
        [*heads, "verdict"], body, caption="Every part of the sentence. A positive difference is a gain. Detectable: the "
        "smallest difference that this many seeds find four times in five."
    )  # fmt: skip


def _reported(rows: Sequence[Mapping[str, Any]]) -> Markup:
    body = [
        [row.get("says", ""), label(row), row["metric"], number(row["mean"], sign=True), _interval(row)] for row in rows
    ]
    return parts.table(["", "comparison", "measure", "mean gain", "interval"], body)


def _cleaned(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return a comparison with None instead of NaN, as in JSON."""

    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and math.isnan(value) else value

    return {
        "low": None,
        "high": None,
        "mean": None,
        **{k: [clean(v) for v in v_] if isinstance(v_, list) else clean(v_) for k, v_ in comparison.items()},
    }


def _seeds(record: Mapping[str, Any]) -> Markup:
    rows = record.get("conjuncts") or record.get("comparisons") or ()
    judged = list(dict.fromkeys([str(record.get("metric", "")), *(str(row["metric"]) for row in rows)]))
    others = [m for m in record.get("metrics") or () if m not in judged]
    html = [_per_seed(record, metric) for metric in judged]
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
    said = ((record.get("meanings") or {}).get(metric) or {}).get("says")
    caption = f"{metric}: {said}" if said else metric
    return parts.table(["", *results], rows, caption=caption, foot=mean if len(seeds) > 1 else None)


def _setting(record: Mapping[str, Any]) -> Markup:
    shared = {"data": record["data"]} if record.get("data") else {}
    shared |= {f"data, {name}": value for name, value in (record.get("data_options") or {}).items()}
    arms = {
        arm: ", ".join(f"{k} {parts.plain(v)}" for k, v in overrides.items()) or parts.DASH
        for arm, overrides in (record.get("arms") or {}).items()
    }
    html = [
        parts.pairs(shared | dict(record.get("setting") or {}), caption="The same for all arms"),
        parts.pairs(arms, caption=f"What the arms differ in; the baseline is {record.get('baseline', parts.DASH)}"),
    ]
    if tuned := record.get("tuned"):
        chosen = {
            arm: ", ".join(f"{k} {parts.plain(v)}" for k, v in point.items()) for arm, point in tuned["chosen"].items()
        }
        html.append(
            parts.pairs(
                chosen, caption=f"Chosen by {tuned['metric']} on valid, seeds {', '.join(map(str, tuned['seeds']))}"
            )
        )
    return parts.join(*html)
