"""Tools: how a model is told of them, and how a call is read from what it says.

A model's own chat template tells it. Models were trained to answer in one of two forms; either is read, since a small
model told of the first may use the second:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>     Qwen, Hermes; several may follow each other
    {"name": ..., "parameters": {...}}                           Llama; nothing else
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge_steer.serve.errors import ApiError
from edge_steer.serve.fields import ChatRequest, NamedTool, Tool
from edge_steer.serve.structured import schema_grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_TAG = re.compile(f"{OPEN}|{CLOSE}")


@dataclass(frozen=True)
class ToolForm:
    """The tools of a request, and the form of a call that the model knows."""

    tools: tuple[Tool, ...]
    tagged: bool
    required: bool

    def grammar(self) -> str | None:
        """GBNF of one call, where a call is required."""
        if not self.required:
            return None
        arguments = "arguments" if self.tagged else "parameters"
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    arguments: tool.function.parameters or {"type": "object"},
                },
                "required": ["name", arguments],
            }
            for tool in self.tools
        ]
        schema = calls[0] if len(calls) == 1 else {"oneOf": calls}
        return schema_grammar(schema, "tools", *((f"{OPEN}\n", f"\n{CLOSE}") if self.tagged else ("", "")))

    def split(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """What an answer says, and the tools that it calls: JSON objects behind its first tag, or all that it is."""
        said, tag, rest = text.partition(OPEN)
        calls = self._calls(_TAG.sub(" ", rest if tag else text))
        return ((said.strip() if tag else "") if calls else text), calls

    def may_begin(self, text: str) -> int:
        """From which character on `text` may be a call, so that it is held back until it is known; its length if
        nowhere."""
        if not text.strip() or text.lstrip().startswith("{"):
            return 0
        if OPEN in text:
            return text.index(OPEN)
        return next((len(text) - n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), len(text))

    def _calls(self, text: str) -> list[dict[str, Any]]:
        """The calls that JSON objects one after another make; none if anything else stands between or behind them."""
        found: list[dict[str, Any]] = []
        at, decoder = 0, json.JSONDecoder()
        while rest := text[at:].lstrip():
            try:
                value, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            at = len(text) - len(rest) + end
            if not (call := self._call(value)):
                return []
            found.append(call)
        return found

    def _call(self, found: Any) -> dict[str, Any] | None:
        """The call that a JSON value makes, if it is one of a tool that there is."""
        if not isinstance(found, dict) or found.get("name") not in [tool.function.name for tool in self.tools]:
            return None
        arguments = found.get("arguments", found.get("parameters", {}))
        function = {"name": found["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def tool_form(request: ChatRequest, template: str | None) -> ToolForm | None:
    """The tools of a request; None where it has none or wants none called. template: the model's, as Jinja.

    Raises ApiError if the template has no place for tools, or the request names a tool that it does not bring.
    """
    choice = request.tool_choice
    if not request.tools or choice == "none":
        return None
    if not template or "tools" not in template:
        raise ApiError(400, "expected a model whose chat template knows tools, got one that does not", param="tools")
    tools: Sequence[Tool] = request.tools
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            names = ", ".join(tool.function.name for tool in request.tools)
            raise ApiError(400, f"expected a tool among {names}, got {choice.function.name!r}", param="tool_choice")
    required = choice == "required" or isinstance(choice, NamedTool)
    return ToolForm(tuple(tools), OPEN in template, required)
