"""GET and POST /v1/steering: what dials there are, their default, and a dial that moves while an answer runs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from edge_steer.serve.errors import ApiError
from edge_steer.serve.fields import Strict
from edge_steer.serve.gate_field import split_gates
from edge_steer.serve.service import Service
from edge_steer.serve.shapes import applied_steering
from edge_steer.serve.steering_field import BadRequest, Dial, describe, parse_named


class Dials(Strict):
    steering: Any


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    def named(asked: Dials) -> dict[str, Dial]:
        try:
            return parse_named(asked.steering, service.llm.steerings)
        except BadRequest as error:
            raise ApiError(400, error.message, param=error.param) from None

    def described() -> dict[str, Any]:
        return describe(service.llm.steerings, service.dials, service.name, service.gates, service.readable())

    @router.get("/v1/steering", response_model=None)
    async def get_steering() -> dict[str, Any]:
        """Every steering, with what a slider needs: its ends' names, unit, default and safe range."""
        return described()

    @router.post("/v1/steering", response_model=None)
    async def set_default(asked: Dials) -> dict[str, Any]:
        """Set the dials and gates of requests that name none. Those that are not named stay."""
        service.dials, service.gates = (
            {**service.dials, **named(asked)},
            {**service.gates, **service.named_gates(asked.steering)},
        )
        return described()

    @router.post("/v1/steering/{id}", response_model=None)
    async def move(id: str, asked: Dials) -> dict[str, Any]:
        """Move the dials of a running or waiting answer, from its next token on. Those that are not named stay."""
        ticket = service.worker.find(id)
        if ticket is None:
            raise ApiError(404, f"expected a running answer, got {id[:80]!r}, which is over or never was", param="id")
        if split_gates(asked.steering)[1]:
            raise ApiError(400, "expected a dial to move, got a gate, which holds for a whole answer", param="steering")
        ticket.move(named(asked))
        return {"id": ticket.id, "steering": applied_steering(ticket.dials, ticket.gates)}

    return router
