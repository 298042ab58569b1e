"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from edge_steer.runtime.answer import TokenChoice
from edge_steer.serve.fields import ChatRequest
from edge_steer.serve.service import Ended, Event, Said, Service
from edge_steer.serve.shapes import answer_readings, applied_steering, choice_detail, head, token_readings, usage
from edge_steer.serve.streaming import PING, collect, data, event_stream
from edge_steer.serve.structured import format_grammar
from edge_steer.serve.tools import ToolForm, tool_form
from edge_steer.serve.worker import Ping, Ticket


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    @router.post("/chat/completions", response_model=None, include_in_schema=False)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        """An answer to a chat, in OpenAI's form; `steering` sets the dials of this answer alone."""
        dials, gates = service.dials_of(asked), service.gates_of(asked)
        form = tool_form(asked, service.llm.chat_template.source)
        tools = {"tools": [tool.model_dump(exclude_none=True) for tool in asked.tools]} if form and asked.tools else {}
        prompt = await service.chat_prompt(asked.messages, **tools)
        more: dict[str, Any] = {"log_probabilities": (asked.top_logprobs or 0) if asked.logprobs else None}
        if grammar := (form.grammar() if form else None) or format_grammar(asked.response_format):
            more["grammar"] = grammar
        sampling = service.sampling_of(asked, **more)
        prompts = [prompt] * (asked.n or 1)
        fresh = asked.cache_prompt is False
        ticket = service.submit("chatcmpl", prompts, sampling, dials, gates, chat=True, fresh=fresh)
        top = head(ticket, service, asked, "chat.completion.chunk" if asked.stream else "chat.completion")
        if asked.stream:
            return event_stream(_chunks(service, ticket, asked, form, top), ticket)
        answers = [ChatAnswer(service, form) for _ in prompts]
        await collect(request, ticket, service.events(ticket), lambda event: take(answers, event))
        choices = [answer.choice(index, asked) for index, answer in enumerate(answers)]
        body = {**top, "choices": choices, "usage": usage([each.ended for each in answers])}
        return JSONResponse(body, headers={"X-Request-Id": ticket.id})

    return router


@dataclass
class ChatAnswer:
    """One choice, as it comes."""

    service: Service
    form: ToolForm | None
    text: str = ""
    told: int = 0  # characters that were streamed
    choices: list[TokenChoice] = field(default_factory=list)
    ended: Ended | None = None

    def add(self, event: Said) -> str:
        """What may be streamed once a piece has come: a text that may be a tool call waits."""
        self.text += event.piece.text
        self.choices += [event.piece.choice] if event.piece.choice else []
        end = self.form.may_begin(self.text) if self.form else len(self.text)
        begin, self.told = self.told, max(self.told, end)
        return self.text[begin : self.told]

    def close(self) -> tuple[str, list[dict[str, Any]], str]:
        """What is left to stream, the tools that are called, and why the answer ended."""
        assert self.ended is not None
        content, calls = self.form.split(self.text) if self.form else (self.text, [])
        return content[self.told :], calls, "tool_calls" if calls else self.ended.answer.finish

    def choice(self, index: int, asked: ChatRequest) -> dict[str, Any]:
        self.told = 0
        if self.ended is None:  # the client has gone, and reads nothing
            return {}
        content, calls, finish = self.close()
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        if calls:
            message["tool_calls"] = calls
        told = _log_probabilities(self.service, self.choices) if asked.logprobs else None
        read = answer_readings(self.ended.answer)
        return {"index": index, "message": message, "logprobs": told, "finish_reason": finish, **read}


def take(answers: Sequence[ChatAnswer], event: Event) -> None:
    if isinstance(event, Said):
        answers[event.index].add(event)
    elif isinstance(event, Ended):
        answers[event.index].ended = event


async def _chunks(
    service: Service, ticket: Ticket, asked: ChatRequest, form: ToolForm | None, top: dict[str, Any]
) -> AsyncIterator[bytes]:
    """The chunks of a streamed answer. The first, with the role and the request's id, comes before its turn.

    `steering` of a chunk is where the dials stood when its text was said.
    """
    answers = [ChatAnswer(service, form) for _ in range(asked.n or 1)]
    empty = {"usage": None} if asked.stream_options and asked.stream_options.include_usage else {}

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, told: Any = None, **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish, **more}
        return data({**top, "choices": [choice], **empty})

    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async with aclosing(service.events(ticket)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Ping):
                yield PING
            elif isinstance(event, Said):
                shown = answers[event.index].add(event)
                top = {**top, "steering": applied_steering(event.dials, ticket.gates)}
                told = _log_probabilities(service, [event.piece.choice]) if event.piece.choice else None
                read = token_readings(event.piece)
                if shown or told or read:
                    yield chunk(event.index, {"content": shown}, told=told, **read)
            elif isinstance(event, Ended):
                answers[event.index].ended = event
                rest, calls, finish = answers[event.index].close()
                if rest:
                    yield chunk(event.index, {"content": rest})
                if calls:
                    yield chunk(event.index, {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
                yield chunk(event.index, {}, finish)
    if empty:
        yield data({**top, "choices": [], "usage": usage([each.ended for each in answers])})


def _log_probabilities(service: Service, choices: Sequence[TokenChoice]) -> dict[str, Any]:
    content = [
        {
            **choice_detail(service, choice.token, choice.log_probability),
            "top_logprobs": [choice_detail(service, *each) for each in choice.likeliest],
        }
        for choice in choices
    ]
    return {"content": content, "refusal": None}
