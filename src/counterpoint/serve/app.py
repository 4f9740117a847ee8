"""Make the application of the local page, and serve it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from counterpoint.errors import CounterpointError
from counterpoint.serve import claim_pages, job_pages, review_pages, run_pages, space_pages
from counterpoint.serve.guard import Guard, Guarded, TooLargeError, is_loopback, token_for
from counterpoint.serve.jobs import Jobs
from counterpoint.serve.places import Places
from counterpoint.serve.review import Reviews
from counterpoint.serve.runs import Index
from counterpoint.serve.showing import Site, static, wrong
from counterpoint.serve.space import Space
from counterpoint.serve.walking import Walk

UPLOADS = ("/search",)  # paths that take files


def site_of(folders: Sequence[Path | str], guard: Guard, out: Path | None = None) -> Site:
    """Make what all pages share.

    Args:
        folders: The folders with runs, records, embeddings, detections and their files. No other file is read.
        guard: The names and secrets of the server.
        out: The folder in which runs are made, inside `folders`. Default: runs/ in the first folder.
    """
    places = Places(folders)
    out = Path(os.path.realpath(out if out is not None else places.folders[0] / "runs"))
    if not any(out.is_relative_to(folder) for folder in places.folders):
        raise CounterpointError(f"--out {out} is outside the folders of this server; name a folder inside them")
    walk = Walk(places)
    return Site(places, walk, Index(places, walk), guard, Space(places, walk), Reviews(places, walk), Jobs(places, out))


def application(site: Site) -> Guarded:
    """Make the ASGI application of a site: the routes of all pages, behind the guard."""

    def missing(request: Request, error: Exception) -> Response:
        return wrong(site, request, "This server has no such page.", 404)

    def failed(request: Request, error: Exception) -> Response:
        return wrong(site, request, "The page failed; the server printed the reason.", 500)

    def too_large(request: Request, error: Exception) -> Response:
        return PlainTextResponse("The upload is too large.", 413)

    pages = (run_pages, claim_pages, space_pages, review_pages, job_pages)
    app = Starlette(
        routes=[
            Route("/static/{name}", static, methods=["GET"]),
            *(route for module in pages for route in module.routes(site)),
        ],
        exception_handlers={404: missing, 500: failed, TooLargeError: too_large},
    )
    return Guarded(app, site.guard, uploads=UPLOADS)


def bound(host: str, port: int) -> socket.socket:
    """Bind the address of the server. CounterpointError when it is taken or does not exist."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        reason = error.strerror or error
        raise CounterpointError(
            f"cannot listen on {host}, port {port} ({reason}); choose another with --port"
        ) from error
    return found


def run(
    folders: Sequence[Path | str],
    *,
    host: str = "127.0.0.1",
    port: int = 8377,
    token: str | None = None,
    names: Sequence[str] = (),
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        folders: The folders that the page may read.
        host: The address to bind. Another one than loopback demands a token.
        port: The port, 0 to 65535; 0: any free one.
        token: The token. Default: one is made where it is demanded.
        names: Further names of this machine that browsers use.
        out: The folder in which runs are made. Default: runs/ in the first folder.
        say: Receives the address and warnings.

    Raises CounterpointError for folders, addresses and tokens that cannot be used.
    """
    import uvicorn

    guard = Guard(host, port, token_for(host, token), tuple(name.lower() for name in names))
    site = site_of(folders, guard, out)
    listening = bound(host, port)
    guard.port = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else "127.0.0.1" if host == "0.0.0.0" else host
    say(f"Folders: {', '.join(map(str, site.places.folders))}")
    say(f"Page: http://{shown}:{guard.port}/" + (f"?token={guard.token}" if guard.token else ""))
    if not is_loopback(host):
        say("Anybody with this address can read the folders and start trainings. The connection is not encrypted.")
    say("Stop: Ctrl-C. Trainings that the page started go on.")
    config = uvicorn.Config(
        application(site),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[listening])
