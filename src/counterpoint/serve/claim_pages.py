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
    recorded, shipped = _records(site, "claims"), catalog.verdicts()
    words = request.query_params.get("q", "")
    rows = []
    for slug, entry in catalog.entries().items():
        if not entry.claim:
            continue
        record = _read(site, recorded[slug]) if slug in recorded else {}
        verdict = str(record.get("verdict") or shipped.get(slug) or "not verified")
        row = {"slug": slug, "claim": entry.claim, "title": entry.title, "verdict": verdict, "here": slug in recorded}
        if all(word in f"{slug} {entry.title} {entry.claim} {verdict}".lower() for word in words.lower().split()):
            rows.append(row)
    compared = [
        {"key": site.places.key(path), "name": name, "claim": found.get("claim", ""), "data": found.get("data", "")}
        for name, path in sorted(_records(site, "compare").items())
        if "comparisons" in (found := _read(site, path))
    ]
    return shown(site, request, "claims.html", rows=rows, compared=compared, words=words)


def claim(site: Site, request: Request) -> Response:
    """Show a claim's record, or the protocol's sentence and the package's verdict where there is no record."""
    slug = str(request.path_params["slug"])
    if slug not in catalog.entries():
        raise unknown("system", slug, catalog.entries())
    entry = catalog.get(slug)
    page = Page(f"Does the claim of {slug} hold?", entry.title)
    path = _records(site, "claims").get(slug)
    if path is not None:
        claim_section(page, _read(site, path))
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


_PARSED: dict[Path, tuple[int, dict[str, Any]]] = {}  # records that were read, with the times of their files


def _read(site: Site, path: Path) -> dict[str, Any]:
    """Read a record. CounterpointError when it is damaged."""
    stamp = path.stat().st_mtime_ns
    if path not in _PARSED or _PARSED[path][0] != stamp:
        try:
            found = json.loads(site.places.read(path))
        except ValueError as error:
            raise CounterpointError(f"{path.name} is not a record: {str(error)[:160]}") from error
        _PARSED[path] = stamp, found if isinstance(found, dict) else {}
    return _PARSED[path][1]
