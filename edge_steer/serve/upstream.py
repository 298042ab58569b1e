"""`edge-steer serve --upstream URL`: the dial in front of an unmodified llama-server.

A request's `steering`, or the dials in its model's name, become the scales of the adapters that `edge-steer export --to
lora` wrote; everything else goes through as it is. What llama-server cannot do is refused by name: it holds an answer's
scales fixed once it runs, and its /v1/messages takes no adapters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_steer.errors import SteerError
from edge_steer.serve.adapters import Listed, Served, all_scales, match, parse_list
from edge_steer.serve.app import guard_app
from edge_steer.serve.errors import UPSTREAM, ApiError
from edge_steer.serve.gate_field import split_alias, split_gates
from edge_steer.serve.guard import Rules
from edge_steer.serve.relay import Relayed, Upstream, beginning_with
from edge_steer.serve.shapes import applied_steering
from edge_steer.serve.steering_field import (
    BadRequest,
    Dial,
    aliases,
    describe,
    parse_alias,
    parse_named,
    parse_steering,
)
from edge_steer.steering import Steering

ADAPTERS = "/lora-adapters"
# Where llama-server generates and takes `lora`; what is answered at the first has room for a field `steering`.
_TELLING = ("/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions", "/completion")
_STEERED = (*_TELLING, "/v1/responses", "/responses", "/infill")
_UNSTEERED = ("/v1/messages",)  # it drops every field that is not Anthropic's
_FRESH_SECONDS = 1.0  # llama-server may be started again with other adapters


@dataclass
class Front:
    """What the routes work on.

    name: of the model, as llama-server calls it. order: adapters by --adapter. dials: of a request that names none.
    keeps_cache: whether llama-server's caches tell one dial from another; if not, no request may use them.
    """

    upstream: Upstream
    steerings: tuple[Steering, ...]
    dials: dict[str, Dial]
    name: str
    order: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    keeps_cache: bool = False
    _found: list[Listed] = field(default_factory=list)
    _matched: dict[str, Served] = field(default_factory=dict)
    _read_at: float = -_FRESH_SECONDS

    async def lora(self, dials: Mapping[str, Dial], request: Request, own: Any = None) -> list[dict[str, Any]]:
        """The field `lora` for these dials. own: that field as the request has it, for adapters of no steering.

        Raises ApiError if the dials cannot be had, or llama-server has other adapters by now.
        """
        if time.monotonic() - self._read_at >= _FRESH_SECONDS:
            body = await self.upstream.json(ADAPTERS, request)
            try:
                self._found = parse_list(body)
                self._matched = match(self.steerings, self._found, self.order)
            except SteerError as error:
                raise ApiError(502, str(error), type=UPSTREAM, code="adapters_changed") from None
            self._read_at = time.monotonic()
        taken = {id for each in self._matched.values() for id in (each.cos, each.sin)}
        others = {each.id: each.scale for each in self._found if each.id not in taken}
        if own is not None:
            others = _own_scales(own, taken)
        try:
            return all_scales(self.steerings, self._matched, others, dials)
        except BadRequest as error:
            raise ApiError(400, error.message, param=error.param) from None

    def dials_of(self, body: dict[str, Any]) -> dict[str, Dial]:
        """Take `steering` out of a request, and the dials out of its model's name; the field comes first."""
        try:
            named = None
            if isinstance(model := body.get("model"), str):
                body["model"], named = parse_alias(model, self.steerings, self.name)
            if split_gates(body.get("steering") or split_alias(str(model))[1])[1]:
                raise BadRequest("steering", "expected dials, got a gate; llama-server has none: adapters act always")
            if "steering" in body:
                return parse_steering(body.pop("steering"), self.steerings)
        except BadRequest as error:
            raise ApiError(400, error.message, param=error.param) from None
        return dict(self.dials) if named is None else named

    async def steer(self, request: Request) -> Response:
        """A request that generates: with its dials as scales."""
        body = await _json_body(request)
        dials = self.dials_of(body)
        body["lora"] = await self.lora(dials, request, body.get("lora"))
        if not self.keeps_cache:
            body["cache_prompt"] = False
        tells = request.scope["path"] in _TELLING
        rewrite = beginning_with({"steering": applied_steering(dials)}) if tells else None
        return Relayed(self.upstream, request, json.dumps(body).encode(), rewrite)


def make_upstream_app(front: Front, rules: Rules) -> ASGIApp:
    """The application: our own routes, the page, and llama-server behind all other paths."""
    app = FastAPI(title="edge-steer", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(_routes(front))
    whole = guard_app(app, rules)
    app.router.routes.append(Route("/{path:path}", _Passing(front)))  # behind the page's
    return whole


def _routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/steering", response_model=None)
    async def get_steering() -> dict[str, Any]:
        return describe(front.steerings, front.dials, front.name)

    @router.post("/v1/steering", response_model=None)
    async def set_default(request: Request) -> dict[str, Any]:
        body = await _json_body(request)
        if "steering" not in body:
            raise ApiError(400, 'expected {"steering": dials}, got no such field', param="steering")
        try:
            dials = {**front.dials, **parse_named(body["steering"], front.steerings)}
        except BadRequest as error:
            raise ApiError(400, error.message, param=error.param) from None
        await front.lora(dials, request)  # refuses what no adapter holds
        front.dials = dials
        return describe(front.steerings, front.dials, front.name)

    @router.post("/v1/steering/{id}", response_model=None)
    async def move(id: str) -> None:
        raise ApiError(
            409, "llama-server holds the dials of an answer fixed once it runs; set them in the next request",
            param="id", code="not_movable",
        )  # fmt: skip

    @router.get("/v1/models", response_model=None)
    @router.get("/models", response_model=None)
    async def models(request: Request) -> Response:
        body = await front.upstream.json(request.scope["path"], request)
        entries = body.get("data") if isinstance(body, dict) else None
        if isinstance(entries, list) and entries and isinstance(entries[0], dict):
            names = aliases(front.name, front.steerings)
            entries += [{**entries[0], "id": name, "aliases": []} for name in names]
        return JSONResponse(body)

    return router


class _Passing:
    """Every other path, by any method."""

    def __init__(self, front: Front) -> None:
        self.front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response: Response
        if request.method == "POST" and scope["path"] in _STEERED:
            response = await self.front.steer(request)
        elif request.method == "POST" and scope["path"] in _UNSTEERED:
            raise ApiError(
                501, f"llama-server takes no adapters at {scope['path']}, so no dial: ask at /v1/chat/completions",
                type="not_supported_error",
            )  # fmt: skip
        else:
            response = Relayed(self.front.upstream, request)
        await response(scope, receive, send)


async def _json_body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise ApiError(400, "expected a JSON object as the request's body, got something else")
    return body


def _own_scales(own: Any, taken: set[int | None]) -> dict[int, float]:
    """The scales of other adapters, as a request asks for them itself."""
    try:
        scales = {int(each["id"]): float(each["scale"]) for each in own}
    except (TypeError, KeyError, ValueError):
        raise ApiError(400, 'expected lora as [{"id": 2, "scale": 1.0}], got something else', param="lora") from None
    if ours := sorted(taken.intersection(scales), key=str):
        raise ApiError(400, f"adapter {ours[0]} is a steering's: set its dial by `steering`", param="lora")
    return scales


def check_url(url: str) -> str:
    """`url`, if it is the address of a server. Raises SteerError."""
    import httpx

    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise SteerError(f"expected --upstream as http://127.0.0.1:8081, got {url!r}")
    return url


def shared_sites(steerings: Sequence[Steering]) -> list[tuple[str, str]]:
    """Pairs of steerings that act at one site, where turns would multiply and adapters add."""
    return [
        (one.name, other.name)
        for i, one in enumerate(steerings)
        for other in steerings[i + 1 :]
        if set(one.steered) & set(other.steered)
    ]
