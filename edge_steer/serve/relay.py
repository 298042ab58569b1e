"""Requests handed on to another server, and its answers handed back, both as they come.

What belongs to one connection stays here; a server that is lost becomes one error; a client that goes away closes the
request that was made for it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import anyio
import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from edge_steer.serve.errors import UPSTREAM, ApiError
from edge_steer.serve.streaming import DONE, data

# Of one connection (RFC 9110, 7.6.1); the body's length is told anew.
_OF_CONNECTION = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
})  # fmt: skip
CONNECT_SECONDS = 10.0
Headers = list[tuple[bytes, bytes]]
Rewrite = Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]]


class Upstream:
    """The server behind `url`. key: what it is asked with, in place of what the client bears."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = httpx.URL(url.rstrip("/"))
        self.key = key
        # An answer may take as long as it likes. No proxy of the environment stands before a server that was named.
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            trust_env=False,
        )

    async def json(self, path: str, request: Request | None = None) -> Any:
        """What GET `path` answers. request: whose key is borne. Raises ApiError where that is no success."""
        headers = [(b"authorization", value) for value in [self._authorization(request)] if value]
        try:
            found = await self.client.send(httpx.Request("GET", self._at(path.encode()), headers=headers))
            found.raise_for_status()
            return found.json()
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            raise ApiError(502 if code != 401 else 401, f"{self.url}{path} answered {code}", type=UPSTREAM) from None
        except (httpx.TransportError, ValueError) as error:
            raise lost(self.url, error) from None

    def request(self, request: Request, content: bytes | AsyncIterator[bytes] | None) -> httpx.Request:
        """The same request, for the server."""
        raw = request.scope.get("raw_path") or request.url.path.encode()
        query = request.scope["query_string"]
        # Which page may ask is decided here; the origin of ours is not the server's concern.
        left_out = ["host", "expect", "origin", *(["content-length"] if isinstance(content, bytes) else [])]
        headers = _end_to_end(request.headers.raw, left_out)
        if self.key is not None:
            headers = [(key, value) for key, value in headers if key != b"authorization"]
            headers.append((b"authorization", f"Bearer {self.key}".encode()))
        url = self._at(raw + (b"?" + query if query else b""))
        return httpx.Request(request.method, url, headers=headers, content=content)

    def _at(self, path: bytes) -> httpx.URL:
        return self.url.copy_with(raw_path=self.url.raw_path.rstrip(b"/") + path)

    def _authorization(self, request: Request | None) -> bytes | None:
        if self.key is not None:
            return f"Bearer {self.key}".encode()
        return request.headers.get("authorization", "").encode("latin-1") or None if request else None


class Relayed(Response):
    """A request, handed on. rewrite: what becomes of the body of a successful answer in JSON, or in events of it.

    content: the body in place of the client's own, which has been read.
    """

    def __init__(
        self, upstream: Upstream, request: Request, content: bytes | None = None, rewrite: Rewrite | None = None
    ) -> None:
        super().__init__()
        self.upstream, self.rewrite = upstream, rewrite
        self._uploaded = anyio.Event()
        self._request = upstream.request(request, self._body(request) if content is None else content)
        if content is not None:
            self._uploaded.set()
            if rewrite is not None:  # what is compressed could not be rewritten
                self._request.headers.pop("accept-encoding", None)

    def _body(self, request: Request) -> AsyncIterator[bytes] | None:
        async def stream() -> AsyncIterator[bytes]:
            async for part in request.stream():
                if part:
                    yield part
            self._uploaded.set()

        if "content-length" in request.headers or "transfer-encoding" in request.headers:
            return stream()
        self._uploaded.set()
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failed: list[ApiError] = []
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                await self._uploaded.wait()
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            try:
                await self._relay(scope, receive, send)
            except (
                ApiError
            ) as error:  # of the guard, which refuses the body; raised behind the group, that would wrap it
                failed.append(error)
            except ClientDisconnect:
                pass
            tasks.cancel_scope.cancel()
        if failed:
            raise failed[0]

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self.upstream.client.send(self._request, stream=True)
        except httpx.TransportError as error:
            refusal = lost(self.upstream.url, error)
            await JSONResponse(refusal.body, refusal.status)(scope, receive, send)
            return
        try:
            await self._hand_back(answer, send)
        finally:
            with anyio.CancelScope(shield=True):
                await answer.aclose()

    async def _hand_back(self, answer: httpx.Response, send: Send) -> None:
        kind = answer.headers.get("content-type", "").partition(";")[0].strip()
        events = kind == "text/event-stream"
        rewrites = self.rewrite is not None and answer.status_code == 200 and (events or kind == "application/json")
        headers = _end_to_end(
            answer.headers.raw, ["date", *(["content-length"] if rewrites else [])]
        )  # uvicorn has its own
        headers = [each for each in headers if not each[0].startswith(b"access-control-")]  # who may read is said here
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        body = answer.aiter_raw()
        try:
            async for chunk in self.rewrite(body) if rewrites and self.rewrite else body:
                await send(_part(chunk, more=True))
        except httpx.TransportError as error:
            if not events:
                return  # unfinished: the connection is closed, and no one takes the part for the whole
            await send(_part(data(lost(self.upstream.url, error).body) + DONE, more=True))
        await send(_part(b"", more=False))


def lost(url: httpx.URL, error: Exception) -> ApiError:
    """502: the server cannot be reached, or ended in the middle."""
    why = " ".join(str(error).split()) or type(error).__name__
    return ApiError(502, f"lost llama-server at {url}: {why}; is it running?", type=UPSTREAM, code="upstream_lost")


def beginning_with(fields: dict[str, Any]) -> Rewrite:
    """Puts fields at the head of the first JSON object of an answer."""
    inserted = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()[1:-1] + b","

    async def rewrite(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        held = b""
        found = False
        async for chunk in chunks:
            held += chunk
            if not found and b"{" in held:
                held, found = held.replace(b"{", b"{" + inserted, 1), True
            if found:
                yield held
                held = b""
        if held:
            yield held

    return rewrite


def _part(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _end_to_end(headers: Iterable[tuple[bytes, bytes]], left_out: Iterable[str]) -> Headers:
    """The headers that are not of one connection, nor left out."""
    found = [(key.lower(), value) for key, value in headers]
    of_connection = b",".join(value for key, value in found if key == b"connection").decode("latin-1").split(",")
    names = {*_OF_CONNECTION, *left_out, *(name.strip().lower() for name in of_connection)}
    return [(key, value) for key, value in found if key.decode("latin-1") not in names]
