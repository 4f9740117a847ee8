"""Render the pages: templates, static files, errors, and the state that all pages share."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from counterpoint import __version__
from counterpoint.errors import CounterpointError
from counterpoint.report import page as parts
from counterpoint.serve.guard import Guard, check_form
from counterpoint.serve.jobs import Jobs
from counterpoint.serve.places import OutsideError, Places
from counterpoint.serve.review import Reviews
from counterpoint.serve.runs import Index
from counterpoint.serve.space import Space
from counterpoint.serve.walking import Walk
from counterpoint.words import counted

STATIC = {  # name -> package and file; nothing else is served as a static file
    "page.css": ("counterpoint.report", "page.css"),
    "timeline.js": ("counterpoint.report", "timeline.js"),
    **{
        name: ("counterpoint.serve", f"static/{name}")
        for name in ("serve.css", "live.js", "forms.js", "map.js", "review.js")
    },
}
TYPES = {"css": "text/css", "js": "text/javascript"}
TABS = (
    ("Runs", "/runs"),
    ("Claims", "/claims"),
    ("Search", "/search"),
    ("Map", "/map"),
    ("Detections", "/detections"),
    ("Train", "/train"),
)
Handler = Callable[[Request, Any], Response]


@dataclass
class Site:
    """What all pages of one server share."""

    places: Places
    walk: Walk
    index: Index
    guard: Guard
    space: Space
    reviews: Reviews
    jobs: Jobs


@functools.cache
def environment() -> Environment:
    """Return the environment of this room's templates, with escaping and the filters of the reports."""
    found = parts.environment("serve/templates")
    found.globals.update(tabs=TABS, version=__version__, plain=parts.plain)
    found.filters.update(ago=ago, path=quote, counted=counted)
    return found


def ago(moment: float) -> str:
    """Format the time since a moment, given in seconds since 1970.

    >>> ago(time.time() - 90), ago(time.time() - 7200)
    ('1 min ago', '2 h ago')
    """
    seconds = max(0, int(time.time() - moment))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


def shown(site: Site, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
    """Render a template as a page."""
    html = (
        environment()
        .get_template(template)
        .render(
            path=request.url.path,
            form_token=site.guard.form_token,
            address=functools.partial(address, request),
            **values,
        )
    )
    return HTMLResponse(html.encode("utf-8", "replace"), status)


def address(request: Request, **changed: Any) -> str:
    """Return the address of this page with some values of its query changed; None removes a value."""
    kept = [(name, value) for name, value in request.query_params.multi_items() if name not in changed]
    new = [(name, value) for name, value in changed.items() if value is not None]
    return f"{quote(request.url.path)}?{urlencode([*kept, *new])}"


def static(request: Request) -> Response:
    """Return one of the scripts and style sheets of this package."""
    name = str(request.path_params["name"])
    if name not in STATIC:
        return PlainTextResponse("no such file", 404)
    package, file = STATIC[name]
    text = resources.files(package).joinpath(file).read_text(encoding="utf-8")
    headers = {"cache-control": "no-cache"}
    return Response(text, media_type=TYPES[name.rpartition(".")[2]], headers=headers)


def file_response(path: Any, kind: str) -> Response:
    """Return a file whose type the server decided. It answers requests for ranges, so that a player can seek."""
    return FileResponse(path, media_type=kind, headers={"cache-control": "private, max-age=60"})


def wrong(site: Site, request: Request, message: str, status: int = 400) -> Response:
    """Return the page of an error: the message, as the command line prints it."""
    if request.headers.get("accept", "").startswith("application/json"):
        return PlainTextResponse(message, status)
    return shown(site, request, "error.html", status=status, message=message)


def reading(site: Site, path: str, handler: Callable[[Request], Response]) -> Route:
    """Make the route of a page that changes nothing. It runs in a thread; the user's errors become pages."""

    async def endpoint(request: Request) -> Response:
        return await _answered(site, request, lambda: handler(request))

    return Route(path, endpoint, methods=["GET"])


def changing(site: Site, path: str, handler: Handler) -> Route:
    """Make the route of a request that changes state. It needs the form's token, as a header or as a field.

    The handler gets the request and its form: fields by name, or what a JSON body holds.
    """

    async def endpoint(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        form: Any
        if kind == "application/json":
            if not check_form(site.guard, request):
                return PlainTextResponse("The form's token is missing; reload the page.", 403)
            try:
                form = await request.json()
            except (ValueError, RecursionError):
                return PlainTextResponse("The body is not JSON.", 400)
            if not isinstance(form, dict):
                return PlainTextResponse("Send a JSON object.", 400)
        elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            form = await request.form(max_files=1, max_fields=200)
            if not check_form(site.guard, request, form):
                return wrong(site, request, "The form's token is missing; reload the page and send it again.", 403)
        else:
            return PlainTextResponse("Send a form or JSON.", 415)
        return await _answered(site, request, lambda: handler(request, form))

    return Route(path, endpoint, methods=["POST"])


async def _answered(site: Site, request: Request, handler: Callable[[], Response]) -> Response:
    try:
        found: Awaitable[Response] = run_in_threadpool(handler)
        return await found
    except OutsideError as error:
        return wrong(site, request, str(error), 404)
    except CounterpointError as error:
        return wrong(site, request, str(error))
    except (FileNotFoundError, NotADirectoryError) as error:  # removed since its folder was listed
        site.walk.forget()
        return wrong(site, request, f"{error.filename or 'a file'} is not there any more; reload the page", 404)


def field(form: Mapping[str, Any], name: str, default: str = "") -> str:
    """Return a text field of a form. Files and missing fields count as the default."""
    value = form.get(name, default)
    return value.strip() if isinstance(value, str) else default
