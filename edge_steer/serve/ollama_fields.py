"""The fields of Ollama's requests, and the same request in OpenAI's form, which one answer function serves."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from edge_steer.serve.errors import ApiError
from edge_steer.serve.fields import ChatRequest, Common, CompletionRequest, Share, Stop, Strict, Tool, Unsigned

Form = TypeVar("Form", bound=Common)
_SAME = ("temperature", "top_k", "top_p", "min_p", "seed", "repeat_penalty", "frequency_penalty", "presence_penalty")


class Options(Strict):
    """num_ctx and what else says how a model is loaded is ignored: it is loaded."""

    num_predict: int | None = Field(default=None, ge=-2, le=0x7FFFFFFF)
    temperature: Unsigned | None = None
    top_k: int | None = Field(default=None, ge=-1, le=0x7FFFFFFF)
    top_p: Share | None = None
    min_p: Share | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=1000)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    steering: Any = None


class Function(Strict):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCall(Strict):
    function: Function


class Message(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None


class Asked(Strict):
    """What chat and generate share. steering: the dials, here or among the options."""

    model: str = Field(min_length=1)
    stream: bool | None = None  # absent: yes
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    steering: Any = None

    def shared(self) -> dict[str, Any]:
        """These fields as OpenAI's."""
        options = self.options or Options()
        found: dict[str, Any] = {name: getattr(options, name) for name in _SAME}
        found |= {"model": self.model.removesuffix(":latest"), "stop": options.stop, "stream": self.stream is not False}
        if options.num_predict is not None:
            found["max_tokens"] = options.num_predict if options.num_predict > 0 else -1
        for holder in (options, self):
            if "steering" in holder.model_fields_set:
                found["steering"] = holder.steering
        return found


class OllamaChat(Asked):
    messages: list[Message] = Field(default_factory=list, max_length=4096)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None

    def as_chat(self) -> ChatRequest:
        """The request in OpenAI's form."""
        messages = [_message(each) for each in self.messages]
        tools = [each.model_dump(exclude_none=True) for each in self.tools] if self.tools else None
        return _valid(
            ChatRequest,
            {**self.shared(), "messages": messages, "tools": tools, "response_format": _format(self.format)},
        )


class OllamaGenerate(Asked):
    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: list[Any] | None = None

    @property
    def is_text(self) -> bool:
        """Whether the prompt stands as it is, without a chat template."""
        return bool(self.raw or self.suffix)

    def as_chat(self) -> ChatRequest:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": self.prompt}]
        return _valid(ChatRequest, {**self.shared(), "messages": messages, "response_format": _format(self.format)})

    def as_text(self) -> CompletionRequest:
        return _valid(CompletionRequest, {**self.shared(), "prompt": self.prompt, "suffix": self.suffix})


def _valid(form: type[Form], fields: dict[str, Any]) -> Form:
    given = {name: value for name, value in fields.items() if value is not None or name == "steering"}
    try:
        return form.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ApiError(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _message(given: Message) -> dict[str, Any]:
    if given.images:
        raise ApiError(400, "expected text alone, got images", param="messages")
    found: dict[str, Any] = {"role": given.role, "content": given.content or ""}
    if given.tool_name:
        found["name"] = given.tool_name
    if given.tool_calls:
        found["tool_calls"] = [
            {"function": {"name": each.function.name, "arguments": json.dumps(each.function.arguments)}}
            for each in given.tool_calls
        ]
    return found


def _format(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if not given:
        return None
    if isinstance(given, str):
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"schema": given}}
