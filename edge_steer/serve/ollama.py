"""Ollama's ways of asking: /api/chat, /api/generate, and what its clients look at first.

Answers are lines of JSON, streamed unless `stream` is false; errors are {"error": text}. The dials are `steering`, in a
request or among its options, or stand in the model's name, as everywhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute

from edge_steer.serve.chat_completions import ChatAnswer
from edge_steer.serve.completions import text_prompts
from edge_steer.serve.errors import ApiError
from edge_steer.serve.fields import ChatRequest, Common, Strict
from edge_steer.serve.ollama_fields import OllamaChat, OllamaGenerate
from edge_steer.serve.ollama_models import describe_model, list_model, names, now
from edge_steer.serve.service import Begun, Ended, Event, Said, Service
from edge_steer.serve.shapes import applied_steering
from edge_steer.serve.steering_field import Dial
from edge_steer.serve.streaming import collect
from edge_steer.serve.structured import format_grammar
from edge_steer.serve.tools import ToolForm, tool_form
from edge_steer.serve.worker import Ticket

VERSION = "0.6.4"  # of Ollama, whose clients ask for no less
_NEVER = "2318-01-01T00:00:00Z"  # a model that is served is not unloaded
_SERVED = "version, tags, show, ps, chat and generate"


class OllamaRoute(APIRoute):
    """A route whose errors are Ollama's: a status and {"error": text}."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def answer_or_error(request: Request) -> Response:
            try:
                return await answer(request)
            except ApiError as error:
                return JSONResponse({"error": error.message}, error.status, error.headers)
            except RequestValidationError as error:
                first = error.errors()[0]
                name = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
                return JSONResponse({"error": f"{name}: {first['msg']}"}, 400)

        return answer_or_error


class ModelNamed(Strict):
    model: str | None = None
    name: str | None = None  # as older clients have it


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=OllamaRoute)

    @router.head("/", include_in_schema=False)
    async def probed() -> Response:
        return Response()

    @router.get("/api/version", response_model=None)
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @router.get("/api/tags", response_model=None)
    async def tags() -> dict[str, Any]:
        """The model and its aliases, each with its dials."""
        return {"models": [list_model(service, name) for name in names(service)]}

    @router.get("/api/ps", response_model=None)
    async def running() -> dict[str, Any]:
        more = {"expires_at": _NEVER, "size_vram": 0, "context_length": service.llm.n_ctx()}
        return {"models": [{**list_model(service, service.name), **more}]}

    @router.post("/api/show", response_model=None)
    async def show(asked: ModelNamed) -> dict[str, Any]:
        name = (asked.model or asked.name or "").removesuffix(":latest")
        if name not in names(service):
            raise ApiError(404, f"model {name[:80]!r} not found; /api/tags lists what there is")
        return describe_model(service)

    @router.post("/api/chat", response_model=None)
    async def chat(asked: OllamaChat, request: Request) -> Response:
        """The next message of a chat."""
        if not asked.messages:
            return _answer_loaded(service, asked.model, {"message": {"role": "assistant", "content": ""}})
        return await _chat(service, request, asked.as_chat(), _message)

    @router.post("/api/generate", response_model=None)
    async def generate(asked: OllamaGenerate, request: Request) -> Response:
        """An answer to one prompt, or with `raw` or `suffix` a text that goes on."""
        if asked.images:
            raise ApiError(400, "expected text alone, got images")
        if not asked.prompt:
            return _answer_loaded(service, asked.model, {"response": ""})
        if not asked.is_text:
            return await _chat(service, request, asked.as_chat(), _response)
        text = asked.as_text()
        prompts = await text_prompts(service, text)
        ticket = service.submit(
            "gen", prompts, service.sampling_of(text), service.dials_of(text), service.gates_of(text)
        )
        return await _answer(service, request, text, _Lines(service, ticket, text, None, _response))

    @router.api_route("/api/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
    async def other(rest: str) -> None:
        raise ApiError(501, f"/api/{rest[:80]} is not served, as there is one model, for text; {_SERVED} are")

    return router


Content = Callable[[str, list[dict[str, Any]]], dict[str, Any]]


@dataclass
class _Lines:
    """An answer as Ollama tells it. Times are seconds."""

    service: Service
    ticket: Ticket
    asked: Common
    form: ToolForm | None
    content: Content
    began: float = field(default_factory=time.perf_counter)
    turn: float | None = None  # at which the request had its turn, and its first token came
    first: float | None = None
    answer: ChatAnswer = field(init=False)
    dials: dict[str, Dial] = field(init=False)  # at which the last token was said

    def __post_init__(self) -> None:
        self.dials = self.ticket.dials
        self.answer = ChatAnswer(self.service, self.form)

    def take(self, event: Event) -> dict[str, Any] | None:
        """The line that an event makes, if it makes one."""
        if isinstance(event, Begun):
            self.turn = time.perf_counter()
        elif isinstance(event, Said):
            self.first = self.first or time.perf_counter()
            self.dials = event.dials
            text = self.answer.add(event)
            return self._line(text, [], done=False) if text else None
        elif isinstance(event, Ended):
            self.answer.ended = event
        return None

    def last(self) -> dict[str, Any]:
        """The line that ends the answer: what is left of it, tools that are called, counts and times."""
        rest, calls, finish = self.answer.close()
        assert self.answer.ended is not None
        found, now = self.answer.ended.answer, time.perf_counter()
        turn = self.turn or self.began
        return {
            **self._line(rest, calls, done=True),
            "done_reason": "length" if finish == "length" else "stop",
            "total_duration": _nanoseconds(now - self.began),
            "load_duration": _nanoseconds(turn - self.began),  # it waited
            "prompt_eval_count": found.prompt_tokens,
            "prompt_eval_duration": _nanoseconds((self.first or now) - turn),
            "eval_count": found.generated_tokens,
            "eval_duration": _nanoseconds(found.seconds),
        }

    def whole(self) -> dict[str, Any]:
        """The answer in one."""
        self.answer.told = 0
        return self.last()

    def _line(self, text: str, calls: list[dict[str, Any]], *, done: bool) -> dict[str, Any]:
        head = {
            "model": self.asked.model,
            "created_at": now(),
            "steering": applied_steering(self.dials, self.ticket.gates),
        }
        return {**head, **self.content(text, calls), "done": done}


async def _chat(service: Service, request: Request, asked: ChatRequest, content: Content) -> Response:
    """As /v1/chat/completions answers it."""
    dials = service.dials_of(asked)
    form = tool_form(asked, service.llm.chat_template.source)
    tools = {"tools": [tool.model_dump(exclude_none=True) for tool in asked.tools]} if form and asked.tools else {}
    prompt = await service.chat_prompt(asked.messages, **tools)
    grammar = (form.grammar() if form else None) or format_grammar(asked.response_format)
    sampling = service.sampling_of(asked, **({"grammar": grammar} if grammar else {}))
    ticket = service.submit("chat", [prompt], sampling, dials, service.gates_of(asked), chat=True)
    return await _answer(service, request, asked, _Lines(service, ticket, asked, form, content))


async def _answer(service: Service, request: Request, asked: Common, lines: _Lines) -> Response:
    headers = {"X-Request-Id": lines.ticket.id}
    if asked.stream:
        return StreamingResponse(_stream(service, lines), headers=headers, media_type="application/x-ndjson")
    await collect(request, lines.ticket, service.events(lines.ticket), lines.take)
    return JSONResponse(lines.whole() if lines.answer.ended else {}, headers=headers)  # {}: the client has gone


async def _stream(service: Service, lines: _Lines) -> AsyncIterator[bytes]:
    try:
        async with aclosing(service.events(lines.ticket)) as events:  # type: ignore[type-var]
            async for event in events:
                if line := lines.take(event):
                    yield _json_line(line)
        if lines.answer.ended:  # not where the server was closed
            yield _json_line(lines.last())
    except ApiError as error:
        yield _json_line({"error": error.message})
    finally:
        lines.ticket.cancel()


def _message(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        functions = [call["function"] for call in calls]
        found["tool_calls"] = [
            {"function": {"name": each["name"], "arguments": json.loads(each["arguments"])}} for each in functions
        ]
    return {"message": found}


def _response(text: str, _: list[dict[str, Any]]) -> dict[str, Any]:
    return {"response": text}


def _answer_loaded(service: Service, model: str, content: dict[str, Any]) -> Response:
    """A request without a prompt asks for the model to be loaded."""
    return JSONResponse({"model": model, "created_at": now(), **content, "done": True, "done_reason": "load"})


def _json_line(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
