"""A server to the page's contract without a model: slow words that name the dial at which they are said.

It runs in a thread, and a test turns its knobs: a key, a full queue, an error in mid stream, gone and back again.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

PAGE = Path(__file__).parent.parent / "edge_steer" / "serve" / "page"
POLICY = {"Content-Security-Policy": "default-src 'self'"}
HAPPY = {
    "name": "happy", "description": "Cheerful and hopeful answers against gloomy ones.", "negative_name": "gloomy",
    "positive_name": "cheerful", "unit": "degrees", "operator": "selective", "default": 4.1, "file_default": 4.1,
    "min": -8.2, "max": 8.2, "provisional": True, "readable": True,
}  # fmt: skip
FORMAL = {
    **HAPPY, "name": "formal", "description": "Formal wording against casual.", "negative_name": "casual",
    "positive_name": "formal", "default": None, "file_default": 3.0, "min": -6.0, "max": 5.0, "provisional": False,
    "readable": False,
}  # fmt: skip

Dials = dict[str, "float | None"]


@dataclass
class Knobs:
    """What a test makes the server do."""

    steerings: list[dict[str, Any]] = field(default_factory=lambda: [HAPPY, FORMAL])
    words: int = 12
    pause: float = 0.04
    text: str = ""  # said as it is, word by word, in place of words that name the dial
    readings: tuple[float, ...] = (-1.2, 0.1, 0.9)  # of happy, one a word in turn, where a request reads
    key: str = ""
    full: int = 0  # so many requests yet are answered by 503
    break_after: int | None = None  # words, then an error in the stream
    loading: bool = False
    most_messages: int = 1000  # of a request; more than that have no room in the context
    requests: list[dict[str, Any]] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)


def error(status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None) -> JSONResponse:
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": code}}
    return JSONResponse(body, status, headers)


def make_app(knobs: Knobs, running: dict[str, Dials]) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def door(request: Request, go_on: Any) -> Response:
        path = request.url.path
        is_open = path in ("/", "/health") or path.startswith("/page/")
        if knobs.key and not is_open and request.headers.get("Authorization") != f"Bearer {knobs.key}":
            return error(401, "expected the server's key, got another")
        response: Response = await go_on(request)
        response.headers.update(POLICY)
        return response

    @app.get("/health")
    async def health() -> Response:
        return error(503, "the model is loading") if knobs.loading else JSONResponse({"status": "ok"})

    @app.get("/v1/steering")
    async def steering() -> dict[str, Any]:
        return {"model": "fake-135m", "unit": None, "steerings": knobs.steerings}

    @app.post("/v1/steering/{answer}")
    async def move(answer: str, request: Request) -> Response:
        body = await request.json()
        knobs.moves.append(body["steering"])
        if answer not in running:
            return error(404, "that answer is over")
        running[answer].update(body["steering"])
        return JSONResponse({"id": answer, "steering": running[answer]})

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        if knobs.full > 0:
            knobs.full -= 1
            return error(503, "the queue is full", {"Retry-After": "1"})
        if len(body["messages"]) > knobs.most_messages:
            return error(400, "the prompt is longer than the context", code="context_length_exceeded")
        if unknown := body["steering"].keys() - {each["name"] for each in knobs.steerings}:
            return error(400, f"expected a steering that is loaded, got {unknown}")
        knobs.requests.append(body)
        answer = f"chatcmpl-{len(knobs.requests)}"
        running[answer] = dict(body["steering"])
        return StreamingResponse(
            stream(knobs, running, answer, read=body.get("read", False)), media_type="text/event-stream"
        )

    @app.get("/")
    async def index() -> Response:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


async def stream(knobs: Knobs, running: dict[str, Dials], answer: str, *, read: bool) -> AsyncIterator[str]:
    def event(delta: dict[str, str], finish: str | None = None, **of_choice: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, **of_choice}
        return f"data: {json.dumps({'id': answer, 'choices': [choice], 'steering': running[answer]})}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        yield ": ping\n\n"
        words = knobs.text.split(" ") if knobs.text else [""] * knobs.words
        for said, word in enumerate(words):
            await asyncio.sleep(knobs.pause)
            if said == knobs.break_after:
                yield f"data: {json.dumps({'error': {'message': 'the device ran out of memory'}})}\n\n"
                break
            found = {"readings": {"happy": knobs.readings[said % len(knobs.readings)]}} if read else {}
            yield event({"content": " " * (said > 0) + (word or named(running[answer]))}, **found)
        else:
            yield event({}, "stop")
            yield f"data: {json.dumps({'id': answer, 'choices': [], 'usage': {'completion_tokens': len(words)}})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        del running[answer]


def named(dials: Dials) -> str:
    """A word for this position: `happy4.1`, or `plain` where all are off."""
    return "".join(f"{name}{value:g}" for name, value in dials.items() if value is not None) or "plain"


class FakeServer:
    """The server on a port of its own, started anew by `start` after `kill`."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/"
        self.knobs = Knobs()
        self.running: dict[str, Dials] = {}
        self.start()

    def reset(self) -> Knobs:
        """All knobs as at first; the same object, which the running app holds."""
        self.knobs.__dict__.update(Knobs().__dict__)
        return self.knobs

    def start(self) -> None:
        config = uvicorn.Config(make_app(self.knobs, self.running), "127.0.0.1", self.port, log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)

    def kill(self) -> None:
        """Gone at once, running answers cut."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)


if __name__ == "__main__":  # to work on the page: `python tests/fake_server.py`
    print(f"fake server: {FakeServer().url}")
    threading.Event().wait()
