"""Check every request before a page sees it: host, token, origin, size. Add the headers that keep a browser safe.

The rules:

- The header Host must name this machine. On loopback that is a loopback name. Elsewhere it is an address in digits, the
  machine's name, or a name that the server was given. So a foreign name that resolves to this machine (DNS rebinding) fails.
- Where the server has a token, a request needs it once, and then the cookie that answers it.
- A request that changes state needs the form's own token, and an origin that is this server.
- A body has a limit of bytes, which counts what arrives and not what is announced.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from counterpoint.errors import CounterpointError

LEAST_TOKEN = 16  # characters of a token that a user chooses
BODY = 2 * 2**20  # maximum bytes of a body
UPLOAD = 20 * 2**20  # maximum bytes of a body with files
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SAFE = ("GET", "HEAD")
HEADERS = {
    # matplotlib's drawings have attributes of style; elements of style and scripts are files of this server.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src-elem 'self'; style-src-attr 'unsafe-inline'; "
    "img-src 'self' data:; media-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer, browsers send forms with the origin "null"
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine only: localhost, 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_for(host: str, given: str | None) -> str | None:
    """Return the token that requests need, or None for a server of this machine only.

    Args:
        host: The address that the server binds to.
        given: The user's token. Default: make one where the host demands it.

    Raises CounterpointError for a token that is easy to guess.
    """
    if given is not None:
        if len(given) < LEAST_TOKEN or not given.isascii() or not given.isprintable() or " " in given:
            raise CounterpointError(
                f"a token needs at least {LEAST_TOKEN} ASCII characters without spaces; leave --token out to get one"
            )
        return given
    return None if is_loopback(host) else secrets.token_urlsafe(32)


@dataclass
class Guard:
    """The secrets and names of one server."""

    host: str = "127.0.0.1"
    port: int = 8377
    token: str | None = None
    names: tuple[str, ...] = ()  # further names of this machine that browsers use
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @property
    def cookie(self) -> str:
        """The cookie's name. Servers on several ports share a browser's cookies, so the name has the port."""
        return f"counterpoint-{self.port}"

    def signed(self, what: str) -> str:
        """Return a value that only this server can make."""
        key = (self.token or "").encode() + self.secret
        return hmac.new(key, what.encode(), hashlib.sha256).hexdigest()

    @property
    def form_token(self) -> str:
        """The value that each form of this server sends back."""
        return self.signed("form")

    def knows_host(self, header: str) -> bool:
        """Return whether the header Host names this server."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        if name in LOOPBACK or name in self.names:
            return True
        if is_loopback(self.host):
            return False
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name in (self.host.lower(), socket.gethostname().lower())

    def allows(self, request: Request) -> bool:
        """Return whether the request has the cookie, or the token as a bearer. Always true without a token."""
        if self.token is None:
            return True
        if equal(request.cookies.get(self.cookie, ""), self.signed("cookie")):
            return True
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and equal(given, self.token)

    def is_own(self, headers: Headers, scheme: str) -> bool:
        """Return whether a request that changes state comes from a page of this server, by the browser's own headers."""
        origin = headers.get("origin")
        if origin is not None and origin != f"{scheme}://{headers.get('host', '')}":
            return False
        return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")

    def admit(self, response: Response) -> None:
        """Give the browser the cookie."""
        response.set_cookie(self.cookie, self.signed("cookie"), httponly=True, samesite="strict", path="/")


def equal(one: str, other: str) -> bool:
    """Compare two secrets in a time that does not depend on their content."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


class TooLargeError(Exception):
    """A body is larger than the server accepts."""


class Guarded:
    """The application behind the guard, as an ASGI application."""

    def __init__(self, app: ASGIApp, guard: Guard, *, uploads: Iterable[str] = ()) -> None:
        self.app, self.guard, self.uploads = app, guard, tuple(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and the end of the server; websockets have no route
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            await refused(scope, receive, guarded_send)
            return
        limit = UPLOAD if scope["path"] in self.uploads else BODY
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdigit() or int(announced) > limit:
            await PlainTextResponse(f"At most {limit:,} bytes.", 413)(scope, receive, guarded_send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await guarded_send(message)

        try:
            await self.app(scope, counted(receive, limit), watched_send)
        except TooLargeError:
            if not started:
                await PlainTextResponse(f"At most {limit:,} bytes.", 413)(scope, receive, guarded_send)

    def _refused(self, scope: Scope) -> Response | None:
        """Return the answer to a request that no page may see, or None."""
        request = Request(scope)
        if not self.guard.knows_host(request.headers.get("host", "")):
            return PlainTextResponse("This server has another name. Open it by the address that it printed.", 421)
        if scope["method"] not in (*SAFE, "POST"):
            return PlainTextResponse("This server takes GET and POST.", 405)
        if scope["method"] == "POST" and not self.guard.is_own(request.headers, scope["scheme"]):
            return PlainTextResponse("The request comes from another site.", 403)
        if self.guard.allows(request):
            return None
        given = request.query_params.get("token", "")
        if scope["method"] == "GET" and self.guard.token and equal(given, self.guard.token):
            answer = RedirectResponse(scope["path"] if not scope["path"].startswith("//") else "/", 303)
            self.guard.admit(answer)
            return answer
        return PlainTextResponse("Open the address with the token that the server printed when it started.", 401)


def counted(receive: Receive, limit: int) -> Receive:
    """Count the bytes of a body as they arrive. Raise TooLargeError above the limit."""
    total = 0

    async def counting() -> MutableMapping[str, Any]:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > limit:
                raise TooLargeError
        return message

    return counting


def check_form(guard: Guard, request: Request, form: Any = None) -> bool:
    """Return whether a request that changes state has the form's token: in a header, or as a field."""
    given = request.headers.get("x-form-token") or (str(form.get("form_token", "")) if form is not None else "")
    return equal(given, guard.form_token)
