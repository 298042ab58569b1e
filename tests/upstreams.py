"""A llama-server that is none, and our server in front of it, each listening at a port of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from planted import random_steering
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_steer.provenance import BaseModel
from edge_steer.serve.guard import Rules
from edge_steer.serve.upstream import make_upstream_app
from edge_steer.serve.upstream_start import open_upstream
from edge_steer.sites import Site
from edge_steer.steering import Steering

BASE = BaseModel("llama", "tiny", 4, 8)
HAPPY = random_steering(BASE, [Site(1, "attn_norm")], seed=0, name="happy").with_(angle=8, angle_min=-20, angle_max=20)
FORMAL = random_steering(BASE, [Site(2, "attn_norm")], seed=1, name="formal").with_(angle=2)
NO_REFUSAL = random_steering(BASE, [Site(1, "attn_norm")], "ablation", seed=2, name="refusal")
PAIR = [("happy-cos.gguf", 0.0), ("happy-sin.gguf", 0.0)]


@dataclass
class Seen:
    method: str
    path: str  # as it was sent, with the query
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: str) -> list[str]:
        return [value.decode() for key, value in self.headers if key.decode().lower() == name]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Fake:
    """Answers as llama-server does, as far as it is asked here. mixes: whether its cache forgets the scales."""

    adapters: list[tuple[str, float]] = field(default_factory=lambda: list(PAIR))
    mixes: bool = False
    width: int = 8
    key: str | None = None
    loading: int = 0  # times that /health answers 503 still
    seen: list[Seen] = field(default_factory=list)
    cut_off: threading.Event = field(default_factory=threading.Event)  # a client that went away was noticed
    going_on: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def asked(self, path: str) -> list[Seen]:
        return [each for each in self.seen if each.path == path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            self.cut_off.set()
            return
        query = scope["query_string"]
        path = (scope["raw_path"] + (b"?" + query if query else b"")).decode()
        self.seen.append(Seen(request.method, path, list(request.headers.raw), body))
        response = await self._answer(request, body)
        if response is not None:
            await response(scope, receive, send)

    async def _answer(self, request: Request, body: bytes) -> Response | None:
        path = request.url.path
        public = ("/health", "/v1/models")
        if self.key and path not in public and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "Invalid API Key", "code": 401}}, 401)
        match path:
            case "/health":
                self.loading -= 1
                return JSONResponse({"status": "ok"}, 200 if self.loading < 0 else 503)
            case "/v1/models":
                return JSONResponse({"object": "list", "data": [{"id": "tiny", "meta": {"n_embd": self.width}}]})
            case "/lora-adapters":
                found = [{"id": id, "path": path, "scale": scale} for id, (path, scale) in enumerate(self.adapters)]
                return JSONResponse(found)
            case "/completion":
                return JSONResponse({"content": "so", "timings": {"cache_n": 20 if self.mixes else 0}})
            case "/v1/chat/completions":
                return await self._chat(request, json.loads(body))
            case "/echo":
                headers = {"X-Kept": "yes", "Connection": "X-Dropped", "X-Dropped": "no", "Set-Cookie": "a=1"}
                return Response(body, 207, headers, "application/x-odd")
        return JSONResponse({"error": {"message": "File Not Found", "code": 404}}, 404)

    async def _chat(self, request: Request, asked: Any) -> Response | None:
        says = asked["messages"][0]["content"]
        if says == "fail":
            return JSONResponse({"error": {"message": "no", "code": 500}}, 500)
        if says == "wait":
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.cut_off.set()
            return None
        if not asked.get("stream"):
            return JSONResponse({"choices": [{"message": {"content": "{so}"}}], "model": asked.get("model")})
        return StreamingResponse(self._events(says), media_type="text/event-stream")

    async def _events(self, says: str) -> Any:
        first = True
        try:
            for word in ("one", "two", "three"):
                if not first and says == "slowly":
                    await asyncio.get_running_loop().run_in_executor(None, self.going_on.wait, 20)
                if not first and says == "die":
                    raise RuntimeError("dies in the middle")
                first = False
                yield f'data: {{"choices":[{{"delta":{{"content":"{word}"}}}}]}}\n\n'
                if says == "forever":
                    await asyncio.sleep(20)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cut_off.set()
            raise


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """The address of an application that listens."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@contextmanager
def in_front_of(
    fake: Fake,
    steerings: Sequence[Steering] = (HAPPY,),
    *,
    rules: Rules | None = None,
    notes: list[str] | None = None,
    **options: Any,
) -> Iterator[httpx.Client]:
    """A client of our server in front of `fake`, at the dials of the files."""
    dials = {each.name: each.default_dial() for each in steerings}
    with listening(fake) as url:
        fake.url = url
        note = (notes if notes is not None else []).append
        front = open_upstream(url, steerings, options.pop("dials", dials), note=note, **options)
        fake.seen.clear()
        with (
            listening(make_upstream_app(front, rules or Rules())) as address,
            httpx.Client(base_url=address, timeout=20, trust_env=False) as client,
        ):
            yield client


def exported(folder: Path, steering: Steering, part: str, name: str) -> str:
    """A file that says that it is an adapter of `steering`, without weights."""
    from edge_steer.export.adapter_label import label
    from edge_steer.export.gguf_bytes import text, write_float32

    path = folder / name
    write_float32(path, {"general.architecture": text("llama"), **label(part, steering, 8.0).metadata()}, {})
    return str(path)
