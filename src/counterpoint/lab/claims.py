"""Collect all recorded claims: write their table, draw their effects with intervals, judge records again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from counterpoint import catalog
from counterpoint.errors import CounterpointError
from counterpoint.files import replacing
from counterpoint.lab.protocol import Protocol, of_system, slugs
from counterpoint.lab.runner import PACKAGE
from counterpoint.lab.verify import FOLDER, judge, missing, read_record
from counterpoint.lab.verify import write as write_record
from counterpoint.words import counted

BEGIN, END = "<!-- all-claims:begin -->", "<!-- all-claims:end -->"


def records(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Read every record of a claim in `folder`, in the catalogue's order, without rehearsals."""
    found = []
    for slug in catalog.entries():
        file = folder / f"{slug}.json"
        if file.is_file():
            try:
                found.append(dict(json.loads(file.read_text(encoding="utf-8"))))
            except ValueError as error:
                raise CounterpointError(f"{file} is not a record: {error}") from error
    if not found:
        raise CounterpointError(f"no claims are recorded in {folder}; make one: counterpoint verify SLUG")
    return found


COLUMNS = ("part", "comparison", "measure", "test", "gain", "interval", "detectable", "verdict")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Format a conjunct of a record as the cells of a table's row, under `COLUMNS`."""
    from counterpoint.report.claim import label, rule_said

    shown = ("-", "-", "-")
    if row.get("mean") is not None:
        interval = "-" if row["low"] is None else f"{row['low']:+.4f} .. {row['high']:+.4f}"
        detectable = row.get("detectable")
        shown = (f"{row['mean']:+.4f}", interval, "-" if detectable is None else f"{detectable:.4f}")
    return (str(row["says"]), label(row), str(row["metric"]), rule_said(row), *shown, str(row["verdict"]))


def write(folder: Path = FOLDER, documents: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Write `<folder>/claims.svg` and the table between the markers of each document. Return the records.

    For the records of the package's own checkout, also write the verdicts beside the protocols, as part of the package.
    """
    from counterpoint.report.analysis import claims_drawing, claims_table

    found = records(folder)
    with replacing(folder / "claims.svg") as file:
        file.write(claims_drawing(found).encode())
    if folder.resolve() == PACKAGE.parents[1] / FOLDER:
        with replacing(PACKAGE / "claims" / "verdicts.json") as file:
            file.write(verdicts_text(found).encode())
    for path in documents:
        text = path.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise CounterpointError(f"{path} has no block {BEGIN} ... {END}; add both markers where the table belongs")
        path.write_text(f"{before}{BEGIN}\n{claims_table(found)}\n{END}{after}", encoding="utf-8")
    return found


def verdicts_text(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the shipped file of verdicts, a line for each recorded claim."""
    return json.dumps({record["slug"]: record["verdict"] for record in found}, indent=1) + "\n"


def rejudge(slug: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Judge a record's figures again by the package's protocol, write the record back and return it.

    Nothing is trained. The record's `protocol` identifies two files: the one that judges (`sha256`) and the one that ran
    (`ran`, null for figures older than all protocols). Where the protocol requires more than the figures have, `missing`
    lists it: other data or settings, more seeds, another arm. A conjunct that the figures cannot decide is "not judged".
    """
    protocol = of_system(slug)
    record = read_record(slug, folder)
    parts: dict[str | None, Protocol] = {None: protocol} | dict(protocol.variants)
    made: dict[str, Any] = {"slug": slug, "title": catalog.get(slug).title}
    for name, part in parts.items():
        old = record if name is None else record.get("variants", {}).get(name)
        if old is None:
            continue
        found = _part(part, old)
        made_by = old["commit"] if "commit" in old else record.get("commit")  # a variant may be of an earlier run
        found["missing"] = [*_differences(part, found), *missing(found | {"commit": made_by})]
        if name is None:
            made |= found
        else:
            kept = {key: old[key] for key in ("minutes", "commit") if key in old}
            made.setdefault("variants", {})[name] = found | kept
    ran_by = record.get("protocol", {}).get("ran", record.get("protocol", {}).get("sha256"))
    made |= {
        "protocol": {"sha256": protocol.sha256, "seeds": protocol.seeds, "minutes": protocol.minutes, "ran": ran_by},
        "commit": record.get("commit"),
        "versions": record["versions"],
        "machine": record["machine"],
        **{name: record[name] for name in ("minutes",) if name in record},
    }
    write_record(made, folder / f"{slug}.json")
    return made


def rejudge_all(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Judge every record in `folder` again; see `rejudge`."""
    return [rejudge(slug, folder) for slug in slugs() if (folder / f"{slug}.json").is_file()]


def _part(part: Protocol, old: Mapping[str, Any]) -> dict[str, Any]:
    results, seeds = old["results"], list(old["seeds"])
    return {
        "claim": part.sentence,
        "kind": part.kind,
        "data": old["data"],
        "data_options": old.get("data_options", part.data_options),
        "data_redrawn": old.get("data_redrawn"),
        "setting": old["setting"],
        "metric": part.conjuncts[0].metric,
        "metrics": sorted({name for by_seed in results.values() for run in by_seed.values() for name in run}),
        "meanings": {name: {"unit": one.unit, "says": one.says} for name, one in part.metrics.items()},
        "baseline": part.conjuncts[0].against,
        "arms": old["arms"],
        "seeds": seeds,
        "results": results,
        **judge(part, results, seeds, strict=False),
        "notes": list(part.notes),
        **{name: old[name] for name in ("tuned",) if name in old},
    }


def _differences(part: Protocol, found: Mapping[str, Any]) -> list[str]:
    """List the protocol's requirements that the figures do not meet, as sentences."""
    said = []
    if found["data"] != part.data or found["data_options"] != part.data_options:
        said.append(f"the protocol's data are '{part.data}', the figures' were '{found['data']}'")
    changed = sorted(
        name for name in {*part.setting, *found["setting"]} if found["setting"].get(name) != part.setting.get(name)
    )
    if changed:
        said.append(f"the protocol has other settings of {', '.join(changed)}")
    if added := sorted(set(part.arms) - set(found["arms"])):
        said.append(f"the protocol has the arm {', '.join(added)}, which was not run")
    if len(found["seeds"]) < part.seeds:
        said.append(f"the protocol asks for {counted(part.seeds, 'seed')}, the figures have {len(found['seeds'])}")
    if part.tuning is not None and "tuned" not in found:
        said.append(f"the protocol tunes {', '.join(part.tuning.grid)} on valid, the figures were not tuned")
    return said
