"""The routes as one application, and what it answers while the model is loading."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_steer._version import __version__
from edge_steer.serve import chat_completions, completions, llama_server, models, ollama, steering_routes
from edge_steer.serve.errors import ApiError, error_body
from edge_steer.serve.guard import Guard, Rules
from edge_steer.serve.service import Service

PAGE = Path(__file__).parent / "page"
# The page takes nothing from elsewhere, and nothing that it shows may be run.
PAGE_POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

FRESH = {"Cache-Control": "no-cache"}


def make_app(service: Service, rules: Rules) -> ASGIApp:
    """The application of a model that is loaded."""
    app = FastAPI(title="edge-steer", version=__version__, docs_url=None, redoc_url=None)
    for part in (chat_completions, completions, steering_routes, models, ollama, llama_server):
        app.include_router(part.routes(service))
    return guard_app(app, rules)


def guard_app(app: FastAPI, rules: Rules) -> ASGIApp:
    """An application with the page, errors in OpenAI's form, and the guard before it."""
    add_page(app)
    add_error_handlers(app)
    if rules.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(rules.origins), allow_methods=["*"], allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )  # fmt: skip
    return Guard(app, rules)


def add_page(app: FastAPI) -> None:
    """The page at /, and what it loads below /page/."""

    mimetypes.add_type("text/javascript", ".js")  # Windows' registry may say text/plain, which no browser runs

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": PAGE_POLICY, **FRESH})

    app.mount("/page", PageFiles(directory=PAGE), name="page")


class PageFiles(StaticFiles):
    """Files that a browser asks after each time, so that a newer version is never mixed with an older."""

    def file_response(self, *args: Any, **more: Any) -> Response:
        response = super().file_response(*args, **more)
        response.headers.update(FRESH)
        return response


def add_error_handlers(app: FastAPI) -> None:
    """Every error as OpenAI's clients read it."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_field(_: Request, error: RequestValidationError) -> Response:
        first: dict[str, Any] = error.errors()[0]
        path = [str(part) for part in first["loc"] if part != "body"]
        name = ".".join(path) or "the body"
        return JSONResponse(error_body(f"{name}: {first['msg']}", param=".".join(path) or None), 400)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(f"{type(error).__name__}: {error}", "server_error"), 500)


class Loading:
    """The page, which says that the model is loading; else 503, until it is given the application of a loaded model."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self._page = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        add_page(self._page)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and (scope["path"] == "/" or scope["path"].startswith("/page/")):
            await self._page(scope, receive, send)
        elif scope["type"] == "http":
            body = error_body("the model is loading; try again in a moment", "server_error", code="loading")
            await JSONResponse(body, 503, {"Retry-After": "2"})(scope, receive, send)
