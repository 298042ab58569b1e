"""POST /v1/completions: text that goes on from a text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from edge_steer.runtime.answer import TokenChoice
from edge_steer.serve.errors import ApiError
from edge_steer.serve.fields import CompletionRequest
from edge_steer.serve.service import Ended, Event, Said, Service
from edge_steer.serve.shapes import answer_readings, head, token_bytes, token_readings, usage
from edge_steer.serve.streaming import PING, collect, data, event_stream
from edge_steer.serve.worker import Ping, Ticket

MOST_PROMPTS = 64


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Text that goes on from a text, in OpenAI's form; `steering` sets the dials of this answer alone."""
        dials, gates = service.dials_of(asked), service.gates_of(asked)
        prompts = await text_prompts(service, asked)
        echoes = (
            [bytes(service.llm.detokenize(each)).decode(errors="replace") for each in prompts] if asked.echo else []
        )
        prompts = [prompt for prompt in prompts for _ in range(asked.n or 1)]
        echoes = [echo for echo in echoes for _ in range(asked.n or 1)] or [""] * len(prompts)
        sampling = service.sampling_of(asked, log_probabilities=asked.logprobs)
        ticket = service.submit("cmpl", prompts, sampling, dials, gates, fresh=asked.cache_prompt is False)
        top = head(ticket, service, asked, "text_completion")
        if asked.stream:
            return event_stream(_chunks(service, ticket, asked, echoes, top), ticket)
        texts = list(echoes)
        told: list[list[TokenChoice]] = [[] for _ in prompts]
        ended: list[Ended | None] = [None] * len(prompts)

        def take(event: Event) -> None:
            if isinstance(event, Said):
                texts[event.index] += event.piece.text
                told[event.index] += [event.piece.choice] if event.piece.choice else []
            elif isinstance(event, Ended):
                ended[event.index] = event

        await collect(request, ticket, service.events(ticket), take)
        choices = [
            _choice(
                index,
                text,
                each.answer.finish,
                _log_probabilities(service, asked, found, len(echo)),
                **answer_readings(each.answer),
            )
            for index, (text, each, found, echo) in enumerate(zip(texts, ended, told, echoes, strict=True))
            if each is not None
        ]
        body = {**top, "choices": choices, "usage": _usage(ended, asked.n or 1)}
        return JSONResponse(body, headers={"X-Request-Id": ticket.id})

    return router


async def text_prompts(service: Service, asked: CompletionRequest) -> list[list[int]]:
    """The tokens of every prompt."""
    given: Any = asked.prompt
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if not given or len(several) > MOST_PROMPTS:
        raise ApiError(400, f"expected 1 to {MOST_PROMPTS} prompts, not empty, got {len(several)}", param="prompt")
    if asked.echo and asked.logprobs is not None:
        raise ApiError(400, "expected echo or logprobs, got both; leave one out", param="echo")
    if asked.suffix:
        return [await _infill(service, each, asked.suffix) for each in several]
    return [
        await service.text_prompt(each) if isinstance(each, str) else service.check_tokens(list(each), "prompt")
        for each in several
    ]


async def _infill(service: Service, prompt: Any, suffix: str) -> list[int]:
    """The tokens that ask for what stands between a prompt and a suffix."""
    model = service.llm._model
    begin, end, middle = model.token_prefix(), model.token_suffix(), model.token_middle()
    if min(begin, end, middle) < 0 or not isinstance(prompt, str):
        raise ApiError(
            400, "expected a model trained to fill in (a coder), and text as prompt, for `suffix`", param="suffix"
        )
    tokenize = service.llm.tokenize
    before, behind = (list(tokenize(text.encode(), add_bos=False, special=False)) for text in (prompt, suffix))
    return service.check_tokens([begin, *before, end, *behind, middle], "prompt")


def _choice(index: int, text: str, finish: str | None, told: Any = None, **more: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": told, "finish_reason": finish, **more}


def _usage(ended: Sequence[Ended | None], n: int) -> dict[str, Any]:
    """As for one prompt, of each of several."""
    parts = [usage(ended[first : first + n]) for first in range(0, len(ended), n)]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _log_probabilities(
    service: Service, asked: CompletionRequest, found: Sequence[TokenChoice | None], offset: int
) -> dict[str, Any] | None:
    if asked.logprobs is None:
        return None
    choices = [each for each in found if each is not None]
    text = [token_bytes(service, each.token).decode(errors="replace") for each in choices]
    offsets = [offset + sum(map(len, text[:i])) for i in range(len(text))]
    top = [
        {token_bytes(service, token).decode(errors="replace"): value for token, value in each.likeliest}
        for each in choices
    ]
    return {
        "tokens": text, "token_logprobs": [each.log_probability for each in choices], "top_logprobs": top,
        "text_offset": offsets,
    }  # fmt: skip


async def _chunks(
    service: Service, ticket: Ticket, asked: CompletionRequest, echoes: Sequence[str], top: dict[str, Any]
) -> AsyncIterator[bytes]:
    ended: list[Ended | None] = [None] * len(echoes)
    offsets = [len(echo) for echo in echoes]
    empty = {"usage": None} if asked.stream_options and asked.stream_options.include_usage else {}
    for index, echo in enumerate(echoes):
        if echo:
            yield data({**top, "choices": [_choice(index, echo, None)], **empty})
    async with aclosing(service.events(ticket)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Ping):
                yield PING
            elif isinstance(event, Said):
                told = _log_probabilities(service, asked, [event.piece.choice], offsets[event.index])
                offsets[event.index] += len(event.piece.text)
                choice = _choice(event.index, event.piece.text, None, told, **token_readings(event.piece))
                yield data({**top, "choices": [choice], **empty})
            elif isinstance(event, Ended):
                ended[event.index] = event
                yield data({**top, "choices": [_choice(event.index, "", event.answer.finish)], **empty})
    if empty:
        yield data({**top, "choices": [], "usage": _usage(ended, asked.n or 1)})
