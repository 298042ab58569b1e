"""The fields of requests, checked. Unknown fields are ignored; a field of a wrong type is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_TEXT = 1 << 16  # characters of a field that no one writes by hand any longer
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, le=0x7FFFFFFF)]
Unsigned = Annotated[float, Field(ge=0, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
Charge = Annotated[float, Field(ge=-100, le=100)]


class Strict(BaseModel):
    """A JSON object whose fields have the types they are declared with: no "8" for 8, no NaN."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Part(Strict):
    """A part of a message's content. Only text is served."""

    type: str
    text: str | None = None


class FunctionCall(Strict):
    name: str
    arguments: str = "{}"  # a JSON object, as text


class ToolCall(Strict):
    id: str | None = None
    type: str = "function"
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Strict):
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Strict):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")  # llama-cpp-python's place for it


class StreamOptions(Strict):
    include_usage: bool | None = None


class Common(Strict):
    """What chat completions and completions share. A field that is absent or null stands at the server's default."""

    model: str | None = None
    steering: Any = Field(
        default=None,
        description='Dials: {"happy": 8}, {"happy": {"strength": 0.5}}, "happy:8,formal:-4"; "" or null is off; '
        'when it acts: {"happy": {"angle": 8, "when": "@response"}}, "happy:8@response"; '
        "absent is the server's default.",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=16)
    max_tokens: int | None = Field(default=None, ge=-1, le=0x7FFFFFFF)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64)
    temperature: Unsigned | None = None
    top_p: Share | None = None
    top_k: int | None = Field(default=None, ge=-1, le=0x7FFFFFFF)
    min_p: Share | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=1000)] | None = None
    frequency_penalty: Charge | None = None
    presence_penalty: Charge | None = None
    logit_bias: Annotated[dict[str, Charge], Field(max_length=1024)] | None = None
    grammar: str | None = Field(default=None, max_length=_TEXT, description="llama.cpp's GBNF.")
    read: bool | None = Field(
        default=None, description="true: each choice and chunk has `readings`, how far tokens lie toward a steering."
    )
    cache_prompt: bool | None = Field(default=None, description="false: evaluate the whole prompt anew.")


class ChatRequest(Common):
    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(default=None, ge=-1, le=0x7FFFFFFF)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None


class CompletionRequest(Common):
    prompt: str | list[str] | list[Token] | list[list[Token]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = None
