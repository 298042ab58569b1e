"""llama-server's own ways of asking: /completion, the tokenizer, the chat template, /props and /metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import Field

from edge_steer._version import __version__
from edge_steer.runtime.answer import TokenChoice
from edge_steer.serve.errors import ApiError
from edge_steer.serve.fields import Common, Message, Strict, Token, Tool
from edge_steer.serve.service import Begun, Ended, Event, Said, Service
from edge_steer.serve.shapes import applied_steering, choice_detail
from edge_steer.serve.steering_field import Dial
from edge_steer.serve.streaming import PING, collect, data, event_stream
from edge_steer.serve.structured import schema_grammar
from edge_steer.serve.worker import Ping, Ticket

_TEXT = 1 << 22  # characters


class NativeRequest(Common):
    prompt: str | list[Token]
    n_predict: int | None = Field(default=None, ge=-2, le=0x7FFFFFFF)
    n_probs: int = Field(default=0, ge=0, le=20)
    json_schema: dict[str, Any] | None = None


class ToTokens(Strict):
    content: str = Field(max_length=_TEXT)
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class FromTokens(Strict):
    tokens: Annotated[list[Token], Field(max_length=_TEXT)]


class ToPrompt(Strict):
    messages: list[Message] = Field(min_length=1, max_length=4096)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/completion", response_model=None)
    @router.post("/completions", response_model=None, include_in_schema=False)
    async def completion(asked: NativeRequest, request: Request) -> Response:
        """Text that goes on from a prompt, which stands as it is."""
        dials = service.dials_of(asked)
        given = asked.prompt
        prompt = (
            await service.text_prompt(given) if isinstance(given, str) else service.check_tokens(list(given), "prompt")
        )
        if asked.n_predict is not None:
            asked = asked.model_copy(update={"max_tokens": asked.n_predict})
        more: dict[str, Any] = {"log_probabilities": asked.n_probs or None}
        if asked.json_schema is not None:
            more["grammar"] = schema_grammar(asked.json_schema, "json_schema")
        sampling = service.sampling_of(asked, **more)
        ticket = service.submit(
            "cmpl", [prompt], sampling, dials, service.gates_of(asked), fresh=asked.cache_prompt is False
        )
        telling = _Telling(service, ticket, asked)
        if asked.stream:
            return event_stream(_chunks(service, telling), ticket, last=b"")
        await collect(request, ticket, service.events(ticket), telling.take)
        return JSONResponse(telling.whole() if telling.ended else {}, headers={"X-Request-Id": ticket.id})

    @router.post("/tokenize", response_model=None)
    async def tokenize(asked: ToTokens) -> dict[str, Any]:
        text = asked.content.encode("utf-8", "replace")
        how = {"add_bos": asked.add_special, "special": asked.parse_special}
        tokens = await service.on_vocabulary(lambda: service.llm.tokenize(text, **how)) if text else []
        if not asked.with_pieces:
            return {"tokens": tokens}
        pieces = [bytes(service.llm.detokenize([token], special=True)) for token in tokens]
        return {"tokens": [{"id": id, "piece": _piece(piece)} for id, piece in zip(tokens, pieces, strict=True)]}

    @router.post("/detokenize", response_model=None)
    async def detokenize(asked: FromTokens) -> dict[str, str]:
        most = service.llm.n_vocab() - 1
        if (wrong := max(asked.tokens, default=0)) > most:
            raise ApiError(400, f"expected tokens from 0 to {most}, got {wrong}", param="tokens")
        text = await service.on_vocabulary(lambda: bytes(service.llm.detokenize(asked.tokens, special=True)))
        return {"content": text.decode("utf-8", "replace")}

    @router.post("/apply-template", response_model=None)
    async def apply_template(asked: ToPrompt) -> dict[str, str]:
        """The prompt that a chat becomes."""
        tools = {"tools": [tool.model_dump(exclude_none=True) for tool in asked.tools]} if asked.tools else {}
        return {"prompt": await service.chat_text(asked.messages, **tools)}

    @router.get("/props", response_model=None)
    async def props() -> dict[str, Any]:
        return _props(service)

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Counts for Prometheus, by llama-server's names."""
        if not service.metrics:
            raise ApiError(501, "expected a server that was started with --metrics", type="not_supported_error")
        return PlainTextResponse(_metrics(service), media_type="text/plain; version=0.0.4")

    return router


@dataclass
class _Telling:
    """An answer as llama-server tells it."""

    service: Service
    ticket: Ticket
    asked: NativeRequest
    text: str = ""
    choices: list[TokenChoice] = field(default_factory=list)
    count: int = 0
    turn: float = 0.0
    first: float = 0.0
    ended: Ended | None = None
    dials: dict[str, Dial] = field(init=False)  # at which the last token was said

    def __post_init__(self) -> None:
        self.dials = self.ticket.dials

    def take(self, event: Event) -> dict[str, Any] | None:
        """What a stream tells of an event, if anything."""
        if isinstance(event, Begun):
            self.turn = time.perf_counter()
        elif isinstance(event, Said):
            self.first = self.first or time.perf_counter()
            self.dials = event.dials
            self.text += event.piece.text
            self.count += 1
            told = [event.piece.choice] if event.piece.choice else []
            self.choices += told
            return {**self._head(event.piece.text, told), "stop": False, "tokens_predicted": self.count}
        elif isinstance(event, Ended):
            self.ended = event
        return None

    def whole(self) -> dict[str, Any]:
        return {**self._head(self.text, self.choices), **self._end()}

    def last(self) -> dict[str, Any]:
        return {**self._head("", []), **self._end()}

    def _head(self, text: str, choices: list[TokenChoice]) -> dict[str, Any]:
        told = [{"id": each.token, **self._detail(each.token, each.log_probability),
                 "top_logprobs": [{"id": id, **self._detail(id, value)} for id, value in each.likeliest]}
                for each in choices]  # fmt: skip
        found = {
            "index": 0,
            "content": text,
            "tokens": [],
            "id_slot": 0,
            "steering": applied_steering(self.dials, self.ticket.gates),
        }
        return {**found, "completion_probabilities": told} if told else found

    def _detail(self, token: int, log_probability: float) -> dict[str, Any]:
        return choice_detail(self.service, token, log_probability)

    def _end(self) -> dict[str, Any]:
        assert self.ended is not None
        answer = self.ended.answer
        return {
            "stop": True,
            "model": self.service.name,
            "tokens_predicted": answer.generated_tokens,
            "tokens_evaluated": answer.prompt_tokens,
            "truncated": False,
            "stop_type": "limit" if answer.finish == "length" else "eos",
            "timings": {
                "prompt_n": answer.prompt_tokens,
                "prompt_ms": 1000 * max(0.0, (self.first or self.turn) - self.turn),
                "predicted_n": answer.generated_tokens,
                "predicted_ms": 1000 * answer.seconds,
                "predicted_per_second": answer.tokens_per_second,
            },
        }


async def _chunks(service: Service, telling: _Telling) -> AsyncIterator[bytes]:
    async with aclosing(service.events(telling.ticket)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Ping):
                yield PING
            elif line := telling.take(event):
                yield data(line)
    if telling.ended:  # not where the server was closed
        yield data(telling.last())


def _piece(piece: bytes) -> str | list[int]:
    """Text, or the bytes of what is only part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _props(service: Service) -> dict[str, Any]:
    llm = service.llm
    sampling = asdict(service.sampling)
    sampling["n_predict"] = sampling.pop("max_tokens")
    return {
        "default_generation_settings": {"n_ctx": llm.n_ctx(), "params": sampling},
        "total_slots": 1,
        "model_alias": service.name,
        "model_path": Path(llm.model_path).name,
        "modalities": {"vision": False, "audio": False},
        "chat_template": llm.chat_template.source or "",
        "n_ctx": llm.n_ctx(),
        "build_info": f"edge-steer {__version__}",
    }


def _metrics(service: Service) -> str:
    load = service.worker.load
    found = (
        ("prompt_tokens_total", "counter", "Prompt tokens of finished answers.", service.prompt_tokens),
        ("tokens_predicted_total", "counter", "Tokens generated.", service.generated_tokens),
        ("requests_processing", "gauge", "Requests at work.", min(load, 1)),
        ("requests_deferred", "gauge", "Requests that wait.", max(load - 1, 0)),
        ("requests_total", "counter", "Requests that ended.", service.worker.finished),
    )
    lines = [
        f"# HELP llamacpp:{name} {text}\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {value}\n"
        for name, kind, text, value in found
    ]
    return "".join(lines)
