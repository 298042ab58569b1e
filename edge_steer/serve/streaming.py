"""How answers travel: server-sent events, and one JSON body whose client may go away."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import StreamingResponse

from edge_steer.serve.errors import ApiError
from edge_steer.serve.service import Event
from edge_steer.serve.worker import Ping, Ticket

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy in between holds nothing back
T = TypeVar("T")


def data(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def event_stream(chunks: AsyncIterator[bytes], ticket: Ticket, last: bytes = DONE) -> StreamingResponse:
    """A response of server-sent events, `last` behind them. Where the client goes away, the ticket is cancelled."""

    async def body() -> AsyncIterator[bytes]:
        held = b""  # what came at once travels at once: a packet costs more than a chunk
        try:
            async for chunk in chunks:
                held += chunk
                if not ticket.has_more:
                    yield held
                    held = b""
        except ApiError as error:
            held += data(error.body)
        finally:
            ticket.cancel()
        yield held + last

    headers = {**_HEADERS, "X-Request-Id": ticket.id}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)


async def collect(
    request: Request, ticket: Ticket, events: AsyncIterator[Event], take: Callable[[Event], object]
) -> None:
    """Give every event to `take`. A client that goes away cancels the ticket; raises what the ticket raises."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    async def read() -> None:
        async with aclosing(events) as stream:  # type: ignore[type-var]
            async for event in stream:
                if not isinstance(event, Ping):
                    take(event)

    await _while(watch, read)


async def _while(beside: Callable[[], Coroutine[Any, Any, None]], work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """`work`, and `beside` for as long as it takes."""
    found: list[T] = []
    failed: list[ApiError] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(beside)
        try:
            found.append(await work())
        except ApiError as error:  # raised behind the group, which would wrap it
            failed.append(error)
        tasks.cancel_scope.cancel()
    if failed:
        raise failed[0]
    return found[0]
