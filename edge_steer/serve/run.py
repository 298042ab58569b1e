"""The server: it listens at once, and answers once the model is loaded."""

from __future__ import annotations

import asyncio
import socket
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_steer.errors import SteerError
from edge_steer.serve.app import Loading

HEADER_SECONDS = 20.0  # a connection has, to ask for something whole
IDLE_SECONDS = 75  # a connection that has asked may stay open
MOST_CONNECTIONS = 512


class Protocol(H11Protocol):
    """uvicorn's HTTP, which closes a connection that never finishes its headers."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._expect()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        super().connection_lost(exc)

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _settle(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    @property
    def url(self) -> str:
        """Where a browser of this machine finds it."""
        near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{near}]' if ':' in near else near}:{self.port}"


def serve(
    address: Address, load: Callable[[], ASGIApp], *, close: Callable[[], None], note: Callable[[str], object],
    open_page: bool = False,
) -> None:  # fmt: skip
    """Serve until Ctrl-C or SIGTERM. load: makes the application, on a thread; close: frees what it holds.

    Raises SteerError if the address cannot be had, and what `load` raises.
    """
    loading, failed = Loading(), []
    config = uvicorn.Config(
        loading, host=address.host, port=address.port, http=Protocol, ws="none", lifespan="off", log_level="warning",
        timeout_keep_alive=IDLE_SECONDS, limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=5,
        server_header=False,
    )  # fmt: skip
    server = uvicorn.Server(config)
    listening = bind(address.host, address.port)

    def run() -> None:
        try:
            loading.app = load()
        except BaseException as error:
            failed.append(error)
            server.should_exit = True
            return
        note(f"serving at {address.url} (Ctrl-C ends it)")
        if open_page:
            webbrowser.open(address.url)

    thread = threading.Thread(target=run, name="load", daemon=True)
    thread.start()
    try:
        server.run(sockets=[listening])
    finally:
        thread.join()
        close()
    if failed:
        raise failed[0]


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, bound now, so that a port that is taken is one line. Raises SteerError."""
    found = socket.socket(family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise SteerError(f"cannot listen at {host}:{port}: {reason}; give another --port") from None
    return found
