"""Show claims with their verdicts, and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from counterpoint import catalog
from counterpoint.errors import CounterpointError, unknown
from counterpoint.report.claim import claim_section, comparison_sections
from counterpoint.report.page import Page
from counterpoint.serve.places import OutsideError
from counterpoint.serve.showing import Site, reading, shown


def routes(site: Site) -> list[Route]:
    """Make the routes of claims and comparisons."""
    return [
        reading(site, "/claims", lambda request: listed(site, request)),
        reading(site, "/claims/{slug}", lambda request: claim(site, request)),
        reading(site, "/comparisons/{key:path}", lambda request: comparison(site, request)),
    ]


def listed(site: Site, request: Request) -> Response:
    """Show each claim with its verdict, and the comparisons."""
    recorded, damaged = _each(site, "claims")
    comparisons, more = _each(site, "compare")
    shipped, words = catalog.verdicts(), request.query_params.get("q", "")
    rows = []
    for slug, entry in catalog.entries().items():
        if not entry.claim:
            continue
        verdict = str(recorded.get(slug, {}).get("verdict") or shipped.get(slug) or "not verified")
        row = {"slug": slug, "claim": entry.claim, "title": entry.title, "verdict": verdict, "here": slug in recorded}
        if all(word in f"{slug} {entry.title} {entry.claim} {verdict}".lower() for word in words.lower().split()):
            rows.append(row)
    compared = [
        {"key": found["key"], "name": name, "claim": found.get("claim", "")}
        for name, found in comparisons.items()
        if "comparisons" in found
    ]
    return shown(site, request, "claims.html", rows=rows, compared=compared, words=words, damaged=[*damaged, *more])


def claim(site: Site, request: Request) -> Response:
    """Show a claim's record, or the protocol's sentence and the package's verdict where there is no record."""
    slug = str(request.path_params["slug"])
    if slug not in catalog.entries():
        raise unknown("system", slug, catalog.entries())
    entry = catalog.get(slug)
    page = Page(f"Does the claim of {slug} hold?", entry.title)
    path = _records(site, "claims").get(slug)
    if path is not None:
        try:
            claim_section(page, _read(site, path))
        except (KeyError, TypeError, AttributeError) as error:
            raise CounterpointError(
                f"{path.name} is not a record of a claim: {type(error).__name__} {error}"
            ) from error
    else:
        verdict = catalog.verdicts().get(slug)
        said = f"The package's verdict: {verdict}." if verdict else "It is not verified yet."
        page.section("The claim", f"{entry.claim} {said} These folders hold no record of it.")
    return shown(site, request, "sections.html", page=page, tab="/claims")


def comparison(site: Site, request: Request) -> Response:
    """Show a comparison's record."""
    path = site.places.path(str(request.path_params["key"]))
    if path.suffix != ".json":
        raise OutsideError(f"{path.name} is no record of a comparison")
    record = _read(site, path)
    if not {"comparisons", "results", "data"} <= set(record):
        raise OutsideError(f"{path.name} is no record of a comparison")
    page = Page(f"{', '.join(record['results'])} on {record['data']}", f"by {record.get('metric', '')}")
    comparison_sections(page, record)
    return shown(site, request, "sections.html", page=page, tab="/claims")


def _records(site: Site, kind: str) -> dict[str, Path]:
    """Return the files of records in the folders named "claims" or "compare", by their names without the ending."""
    files = [Path(file) for file in site.walk().ending(".json")]
    return {file.stem: file for file in reversed(files) if file.parent.name == kind}


def _each(site: Site, kind: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Read all records of a kind. Return those that are readable by name, with their key, and a message for each other one."""
    found: dict[str, dict[str, Any]] = {}
    damaged: list[str] = []
    for name, path in sorted(_records(site, kind).items()):
        try:
            found[name] = _read(site, path) | {"key": site.places.key(path)}
        except (OutsideError, FileNotFoundError):  # removed since the folder was listed
            continue
        except CounterpointError as error:
            damaged.append(f"{site.places.key(path)}: {error}")
    return found, damaged


_PARSED: dict[Path, tuple[int, dict[str, Any]]] = {}  # records that were read, with the times of their files


def _read(site: Site, path: Path) -> dict[str, Any]:
    """Read a record. CounterpointError when it is damaged."""
    stamp = path.stat().st_mtime_ns
    if path not in _PARSED or _PARSED[path][0] != stamp:
        try:
            found = json.loads(site.places.read(path))
        except (ValueError, RecursionError) as error:
            raise CounterpointError(f"{path.name} is not a record: {str(error)[:160]}") from error
        if not isinstance(found, dict):
            raise CounterpointError(f"{path.name} is not a record: it holds no object")
        _PARSED[path] = stamp, found
    return _PARSED[path][1]
