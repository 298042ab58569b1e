"""What is looked at before any route: who asks, from where, and how much they send.

A page that a browser shows can ask any address, this machine's too. So a Host that is a name other than localhost is
refused (DNS rebinding), and a request that a page of another origin makes, unless `cors` names that origin.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_steer.serve.errors import ApiError

DRAIN_SECONDS = 5.0  # for a body that is too large, whose sender looks at the answer only then
OPEN_PATHS = ("/health", "/", "/favicon.ico")  # what needs no key: the page asks for it


@dataclass(frozen=True)
class Rules:
    """key: what every request but an open path bears; None: none. origins: pages that may ask. hosts: names by which
    this server may be called, beside addresses and localhost. body_bytes, body_seconds: of a request."""

    key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    open_paths: tuple[str, ...] = field(default=OPEN_PATHS)


class Guard:
    """ASGI middleware that keeps Rules."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_caller(scope, headers)
            body = _Body(receive, headers, self.rules)
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return

        async def send_unless_refused(message: Message) -> None:
            if body.refused is None:  # else the application answers that it could not read the body
                await send(message)

        await self.app(scope, body.receive, send_unless_refused)
        if body.refused is not None:
            await _refuse(body.refused, scope, receive, send)

    def _check_caller(self, scope: Scope, headers: Headers) -> None:
        """Raise ApiError if this caller may not ask for this."""
        rules = self.rules
        host, origin = headers.get("host", ""), headers.get("origin")
        if rules.key is None and not _is_near(_host_name(host), rules.hosts):
            raise ApiError(421, f"expected Host localhost or an address, got {host[:80]!r}; add it by --allow-host")
        own = origin is not None and origin.partition("://")[2] == host
        if origin is not None and not own and origin not in rules.origins and "*" not in rules.origins:
            raise ApiError(403, f"expected a request of this server's own page, got one of {origin[:80]!r}; see --cors")
        path = scope["path"]
        needs_key = path not in rules.open_paths and not path.startswith("/page/") and scope["method"] != "OPTIONS"
        if rules.key is not None and needs_key and not _bears(headers, rules.key):
            raise ApiError(
                401, "expected the server's key as `Authorization: Bearer KEY`, got none or another",
                type="authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


class _Body:
    """The body of a request, given up on where it is too large or too slow; `refused` is then the reason."""

    def __init__(self, receive: Receive, headers: Headers, rules: Rules) -> None:
        self.refused: ApiError | None = None
        self._receive, self._rules = receive, rules
        self._count, self._whole = 0, False
        self._deadline = asyncio.get_running_loop().time() + rules.body_seconds
        claimed = headers.get("content-length", "0")
        if claimed.isdigit() and int(claimed[:20]) > rules.body_bytes:
            raise _too_large(rules.body_bytes)

    async def receive(self) -> Message:
        """The next part; behind the last, what becomes of the client. Raises ApiError."""
        if self._whole:
            return await self._receive()
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except asyncio.TimeoutError:
            seconds = self._rules.body_seconds
            self.refused = ApiError(408, f"expected a request within {seconds:g} seconds, got a part of one")
            raise self.refused from None
        self._count += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._count > self._rules.body_bytes:
            self.refused = _too_large(self._rules.body_bytes)
            raise self.refused
        return message


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    if error.status == 413 and "expect" not in Headers(scope=scope):  # else the client asks before it sends
        await _drain(receive)
    await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)


async def _drain(receive: Receive) -> None:
    """Read on for a while what a client sends: closed over bytes that nobody read, a socket takes the answer along."""

    async def read() -> None:
        while (await receive()).get("more_body", False):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), DRAIN_SECONDS)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"expected a request of at most {most} bytes, got more", headers={"Connection": "close"})


def _bears(headers: Headers, key: str) -> bool:
    """Whether a request bears the key; compared in constant time."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())


def _host_name(host: str) -> str:
    """A Host without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_near(name: str, hosts: tuple[str, ...]) -> bool:
    """Whether a Host is an address or localhost, which no one else's DNS can name, or one that is allowed."""
    if name.lower().rstrip(".") in ("localhost", *(host.lower() for host in hosts)):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
