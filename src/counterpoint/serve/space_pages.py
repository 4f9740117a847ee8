"""Search a run's embeddings, and label items on a map of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from counterpoint.errors import CounterpointError, DataError
from counterpoint.search.stored import WORDED
from counterpoint.serve.guard import UPLOAD
from counterpoint.serve.labels import add_labels, as_csv, as_jsonl, check_label, labels_file, read_labels
from counterpoint.serve.places import OutsideError
from counterpoint.serve.review_pages import download
from counterpoint.serve.showing import Site, changing, field, file_response, reading, shown
from counterpoint.serve.space import SAMPLE, SCALE, Table, grouped

HITS = 24  # of a search
LISTENED = {".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg", ".ogg": "audio/ogg", ".opus": "audio/ogg",
            ".m4a": "audio/mp4", ".aac": "audio/aac"}  # fmt: skip


def routes(site: Site) -> list[Route]:
    """Make the routes of search and map."""
    return [
        reading(site, "/search", lambda request: search_page(site, request)),
        changing(site, "/search", lambda request, form: search(site, request, form)),
        reading(site, "/item/{split}/{item:int}/{modality}", lambda request: item(site, request)),
        reading(site, "/map", lambda request: map_page(site, request)),
        reading(site, "/map/points", lambda request: points(site, request)),
        reading(site, "/map/item", lambda request: about(site, request)),
        reading(site, "/map/labels", lambda request: labels(site, request)),
        changing(site, "/map/labels", lambda request, form: label(site, request, form)),
    ]


def _table(site: Site, values: Mapping[str, Any]) -> Table | None:
    """Return the file of embeddings that a request names, or the first one; None where there is none."""
    key = values.get("in")
    if isinstance(key, str) and key:
        return site.space.table(key)
    return next(iter(site.space.tables()), None)


def _needed(site: Site, values: Mapping[str, Any]) -> Table:
    table = _table(site, values)
    if table is None:
        raise OutsideError("there is no file of embeddings; make one: counterpoint embed RUN -o FILE.parquet")
    return table


def search_page(site: Site, request: Request, **more: Any) -> Response:
    """Show the form of a search, and its hits."""
    table = more.pop("table", None) or _table(site, request.query_params)
    found = {"words": "", "modality": "", "target": None, "hits": [], "error": "", "upload": ""} | more
    status = 400 if found["error"] else 200
    return shown(
        site, request, "search.html", status=status, tables=site.space.tables(), table=table, worded=WORDED, **found
    )


def search(site: Site, request: Request, form: Mapping[str, Any]) -> Response:
    """Search by words, by an uploaded picture or sound, or by both."""
    table = _needed(site, form)
    words, modality = field(form, "words"), field(form, "modality")
    upload = form.get("file")
    content, name = b"", ""
    if isinstance(upload, UploadFile):
        content, name = upload.file.read(UPLOAD + 1), upload.filename or ""
    more: dict[str, Any] = {"table": table, "words": words, "modality": modality, "upload": name if content else ""}
    try:
        target, hits = site.space.search(table, words=words, upload=content, modality=modality, k=HITS)
    except CounterpointError as error:
        return search_page(site, request, error=str(error), **more)
    kinds = table.modalities
    rows = [
        {"hit": hit, "shown": [(n, k) for n, k in kinds.items() if k in ("image", "audio")], "texts": hit.texts}
        for hit in hits
    ]
    return search_page(site, request, target=target, hits=rows, **more)


def item(site: Site, request: Request) -> Response:
    """Return an item's thumbnail or sound."""
    table = _needed(site, request.query_params)
    split, number = str(request.path_params["split"]), int(request.path_params["item"])
    modality = str(request.path_params["modality"])
    file = site.space.sound(table, split, number, modality)
    if file is not None:
        if file.suffix.lower() not in LISTENED:
            raise DataError(f"browsers do not play {file.suffix} files")
        return file_response(file, LISTENED[file.suffix.lower()])
    content, kind = site.space.shown(table, split, number, modality)
    return Response(content, media_type=kind, headers={"cache-control": "private, max-age=600"})


def map_page(site: Site, request: Request) -> Response:
    """Show the map's page. Its script asks for the points."""
    table = _table(site, request.query_params)
    modality = request.query_params.get("modality") or (next(iter(table.modalities)) if table else "")
    return shown(site, request, "map.html", tables=site.space.tables(), table=table, modality=modality, sample=SAMPLE)


def points(site: Site, request: Request) -> Response:
    """Return the map: rows, coordinates, the groups by the data's labels, and the labels given so far."""
    table = _needed(site, request.query_params)
    made = site.space.map(table, request.query_params.get("modality") or next(iter(table.modalities)))
    found = site.space.embeddings(table)
    rows = made.rows.tolist()
    titles, groups = grouped([found.label[row] for row in rows])
    given = read_labels(labels_file(site.space.run(table).path, table.path))
    mine = {
        n: given[key]["label"]
        for n, row in enumerate(rows)
        if (key := (found.split[row], int(found.item[row]))) in given
    }
    return JSONResponse(
        {
            "rows": rows,
            "x": made.points[:, 0].tolist(),
            "y": made.points[:, 1].tolist(),
            "scale": SCALE,
            "share": made.share,
            "total": made.total,
            "titles": titles,
            "groups": groups,
            "given": mine,
        }
    )


def about(site: Site, request: Request) -> Response:
    """Return the description of one item of the map."""
    number = request.query_params.get("row", "")
    if not number.isdecimal():
        raise OutsideError("a row is a whole number")
    return JSONResponse(site.space.about(_needed(site, request.query_params), int(number)))


def label(site: Site, request: Request, form: Any) -> Response:
    """Give the chosen rows a label; an empty one removes it."""
    table = _needed(site, request.query_params)
    rows, name = (form.get("rows"), form.get("label")) if isinstance(form, dict) else (None, None)
    if not isinstance(rows, list) or not isinstance(name, str) or len(rows) > SAMPLE:
        raise CounterpointError(f"send rows, at most {SAMPLE}, and a label")
    found = site.space.embeddings(table)
    if not all(type(row) is int and 0 <= row < len(found.split) for row in rows):
        raise OutsideError("a row is not in the file of embeddings")
    items = [
        {"split": found.split[r], "item": int(found.item[r]), "source": found.source[r]} for r in dict.fromkeys(rows)
    ]
    file = labels_file(site.space.run(table).path, table.path)
    return JSONResponse({"labelled": add_labels(file, items, check_label(name)), "file": str(file)})


def labels(site: Site, request: Request) -> Response:
    """Return all labels of a file of embeddings, as CSV or JSONL."""
    table = _needed(site, request.query_params)
    rows = list(read_labels(labels_file(site.space.run(table).path, table.path)).values())
    if request.query_params.get("form") == "jsonl":
        return download(as_jsonl(rows), "application/jsonl", f"labels-{table.path.stem}.jsonl")
    return download(as_csv(rows), "text/csv", f"labels-{table.path.stem}.csv")
