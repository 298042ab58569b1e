"""GET /health, /v1/models: whether the server is ready, and the names by which its model is asked for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from edge_steer.serve.errors import ApiError
from edge_steer.serve.service import Service
from edge_steer.serve.steering_field import aliases


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.created, "owned_by": "edge-steer"}

    @router.get("/health", response_model=None)
    async def health() -> dict[str, Any]:
        """Whether the model is loaded, and how many requests it has before it."""
        return {"status": "ok", "load": service.worker.load}

    @router.get("/v1/models", response_model=None)
    @router.get("/models", response_model=None, include_in_schema=False)
    async def models() -> dict[str, Any]:
        """The model, and its aliases: each steering at half and at the end of its range, for clients that know no
        further fields."""
        names = [service.name, *aliases(service.name, service.llm.steerings)]
        return {"object": "list", "data": [entry(name) for name in names]}

    @router.get("/v1/models/{id:path}", response_model=None)
    async def model(id: str) -> dict[str, Any]:
        """The model, or one of its aliases."""
        if id != service.name and id not in aliases(service.name, service.llm.steerings):
            raise ApiError(404, f"expected {service.name}, or an alias that /v1/models lists, got {id[:80]!r}")
        return entry(id)

    return router
