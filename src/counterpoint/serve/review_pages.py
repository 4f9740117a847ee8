"""Show detections: each video's timeline with a keyboard for its moments, and exports of the decisions."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from counterpoint.report.detection import distinct_names, timeline
from counterpoint.serve.labels import as_csv
from counterpoint.serve.places import OutsideError
from counterpoint.serve.review import COLUMNS, Found, moment, rank
from counterpoint.serve.showing import Site, changing, file_response, reading, shown


def routes(site: Site) -> list[Route]:
    """Make the routes of detections."""
    return [
        reading(site, "/detections", lambda request: listed(site, request)),
        reading(site, "/video/{number:int}/{key:path}", lambda request: video(site, request)),
        reading(site, "/cuts/{number:int}/{key:path}", lambda request: cuts(site, request)),
        reading(site, "/export/{key:path}", lambda request: export(site, request)),
        reading(site, "/detection/{number:int}/{key:path}", lambda request: one(site, request)),
        changing(site, "/decide/{number:int}/{key:path}", lambda request, form: decide(site, request, form)),
    ]


def _asked(site: Site, request: Request) -> tuple[Found, int]:
    found = site.reviews.get(str(request.path_params["key"]))
    number = int(request.path_params["number"])
    if number >= len(found.videos):
        raise OutsideError(f"{found.path.name} has no video {number}")
    return found, number


def listed(site: Site, request: Request) -> Response:
    """Show the files of detections, with each video and how many of its moments are decided."""
    groups: dict[str, dict[str, Any]] = {}
    for found in site.reviews.all():
        decided = site.reviews.decisions(found)
        folder = found.group
        key = found.key if folder is None else site.places.key(folder)
        group = groups.setdefault(
            key, {"key": key, "name": (folder or found.path).name, "run": found.run, "videos": []}
        )
        for number, video in enumerate(found.videos):
            row = {
                "link": f"{number}/{found.key}",
                "rank": rank(found, number),
                "video": video.video,
                "duration": video.duration,
                "moments": len(video.intervals),
                "highest": video.highest,
                "decided": len({moment(i) for i in video.intervals} & decided.get(str(video.video), {}).keys()),
            }
            group["videos"].append(row)
    rows = list(groups.values())
    for group in rows:
        for row, name in zip(group["videos"], distinct_names([row["video"] for row in group["videos"]]), strict=True):
            row["name"] = name
        group["videos"].sort(key=lambda row: row["rank"])
    return shown(site, request, "detections.html", rows=rows)


def one(site: Site, request: Request) -> Response:
    """Show the timeline of one video, with the decisions on its moments."""
    found, number = _asked(site, request)
    made = found.videos[number]
    source = f"/video/{number}/{found.key}" if site.reviews.video(found, number) else None
    remark = ""
    if not source:
        here = site.reviews.place(found, number)
        why = (
            f"Browsers do not play {made.video.suffix or 'such'} files"
            if here
            else "The video is not in the folders of this server"
        )
        remark = f"{why}. The timeline works without it."
    pictured = replace(made, thumbnails=site.reviews.pictures(found, number))
    html = timeline(pictured, {"source": source, "embedded": False, "link": None, "remark": remark})
    decided = site.reviews.decisions(found).get(str(made.video), {})
    after = site.reviews.following(found, number)
    return shown(
        site,
        request,
        "detection.html",
        found=found,
        number=number,
        name=made.video.name,
        after=after and (f"{after[1]}/{after[0].key}", after[0].videos[after[1]].video.name),
        html=html,
        decided={moment(i): decided.get(moment(i), "") for i in made.intervals},
    )


def video(site: Site, request: Request) -> Response:
    """Return the file of a video, whole or in ranges."""
    found, number = _asked(site, request)
    file = site.reviews.video(found, number)
    if file is None:
        raise OutsideError("the video is not in the folders of this server")
    return file_response(*file)


def decide(site: Site, request: Request, form: Any) -> Response:
    """Keep a decision, and return all decisions on the video."""
    found, number = _asked(site, request)
    if not isinstance(form, dict):
        form = dict(form)
    return JSONResponse(site.reviews.decide(found, number, str(form.get("moment", "")), str(form.get("decision", ""))))


def export(site: Site, request: Request) -> Response:
    """Return all moments of a file, or of a folder of results, as CSV or JSON; `only=accept` leaves out the others."""
    key = str(request.path_params["key"])
    chosen = site.reviews.below(key)
    only = request.query_params.get("only")
    rows = [row for found in chosen for row in site.reviews.rows(found) if only in (None, row["decision"])]
    if request.query_params.get("form") == "json":
        text, kind, ending = json.dumps(rows, indent=1, ensure_ascii=False), "application/json", "json"
    else:
        text, kind, ending = as_csv(rows, COLUMNS), "text/csv", "csv"
    return download(text, kind, f"{Path(key).stem}-reviewed.{ending}")


def cuts(site: Site, request: Request) -> Response:
    """Return the accepted moments of a video as EDL, OTIO or WebVTT."""
    from counterpoint.use.cut_lists import write_edl, write_otio, write_vtt

    found, number = _asked(site, request)
    form = request.query_params.get("form", "")
    write = {"edl": write_edl, "otio": write_otio, "vtt": write_vtt}.get(form)
    if write is None:
        raise OutsideError("cut lists have the forms edl, otio and vtt")
    made = site.reviews.accepted(found, number)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"moments.{form}"
        write(made, file)
        return download(file.read_bytes(), CUTS[form], f"{made.video.stem}-accepted.{form}")


CUTS = {"edl": "text/plain", "otio": "application/json", "vtt": "text/vtt"}


def download(text: str | bytes, kind: str, name: str) -> Response:
    """Return a text as a file to keep. Characters of its name that a header cannot hold are replaced."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
    return Response(
        text if isinstance(text, bytes) else text.encode("utf-8", "replace"),
        media_type=kind,
        headers={"content-disposition": f'attachment; filename="{safe}"'},
    )
