"""Rendering of chat templates: llama.cpp's own by name, and Jinja ones, bounded in size and time.

A Jinja template is a program from an untrusted file. llama-cpp-python's formatter compiles and runs it in Jinja's
sandbox, which keeps it from the machine but not from memory: `'x' * 10**10` asks for 10 GB. Here the operators that
make long values look first, what is written is counted piece by piece, and a render that takes too long stops at its
next piece.
"""

from __future__ import annotations

import ctypes
import re
import time
from typing import Any

import jinja2
import jinja2.ext
import llama_cpp
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp import llama_chat_format

from edge_steer import compatibility

compatibility.check()  # a class of llama-cpp-python's is built on below, and another where this is imported

MOST_CHARACTERS = 1 << 24
MOST_SECONDS = 10.0


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no operator makes a value of more than MOST_CHARACTERS."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(each) for each in (left, right) if isinstance(each, (str, list, tuple))]
        numbers = [abs(each) for each in (left, right) if isinstance(each, int)]
        longest = sum(sizes)
        if operator == "*" and sizes and numbers:
            longest = sizes[0] * numbers[0]
        elif operator == "**" and len(numbers) == 2:
            longest = int(numbers[0]).bit_length() * numbers[1] // 8
        elif operator == "%" and isinstance(left, str):
            longest = max((int(digits) for digits in _digits(left)), default=0) + longest
        if longest > MOST_CHARACTERS:
            raise ValueError(f"expected a template that writes at most {MOST_CHARACTERS} characters, got {longest}")
        return super().call_binop(context, operator, left, right)


class BoundedChatFormatter(llama_chat_format.Jinja2ChatFormatter):  # type: ignore[misc]
    """llama-cpp-python's formatter with bounds. Rendering raises what a template raises, ValueError past a bound."""

    def __init__(self, template: str, eos_token: str, bos_token: str, **how: Any) -> None:
        super().__init__("", eos_token, bos_token, **how)  # which would compile it unbounded: constants are computed
        self.template = template
        environment = _Environment(
            loader=jinja2.BaseLoader(), trim_blocks=True, lstrip_blocks=True,
            extensions=[self.IgnoreGenerationTags, jinja2.ext.loopcontrols],
        )  # fmt: skip
        environment.filters["tojson"] = self.tojson
        self._environment = _Bounded(environment.from_string(template))


class _Bounded:
    """What the formatter asks of a template, piece by piece."""

    def __init__(self, template: jinja2.Template) -> None:
        self._template = template

    def render(self, **values: Any) -> str:
        pieces: list[str] = []
        size, end = 0, time.monotonic() + MOST_SECONDS
        for piece in self._template.generate(**values):
            size += len(piece)
            if size > MOST_CHARACTERS:
                raise ValueError(f"expected a template that writes at most {MOST_CHARACTERS} characters, got more")
            if time.monotonic() > end:
                raise ValueError(f"expected a template that takes at most {MOST_SECONDS:g} seconds, got more")
            pieces.append(piece)
        text = "".join(pieces)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("expected a template that writes text, got half of a surrogate pair") from None
        said = any(str(message.get("content") or "").strip() for message in values.get("messages") or ())
        if said and not text.strip():
            raise ValueError("expected a template that writes a prompt, got nothing")
        return text


def _digits(text: str) -> list[str]:
    return re.findall(r"\d{1,18}", text)


def builtin_names() -> list[str]:
    """The templates that llama.cpp has by name, as its `--chat-template` takes them."""
    count = llama_cpp.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * count)()
    llama_cpp.llama_chat_builtin_templates(names, count)
    return [name.decode() for name in names if name]


def apply_builtin(name: str, messages: list[dict[str, str]]) -> str:
    """A chat as llama.cpp's template `name` writes it, generation prompt included."""
    parts = [(each["role"].encode(), each["content"].encode()) for each in messages]
    chat = (llama_cpp.llama_chat_message * len(parts))(*(llama_cpp.llama_chat_message(*part) for part in parts))
    size = 1024 + 2 * sum(len(role) + len(content) for role, content in parts)
    while True:
        buffer = ctypes.create_string_buffer(size)
        count = llama_cpp.llama_chat_apply_template(name.encode(), chat, len(parts), True, buffer, size)
        if count < 0:
            raise ValueError(f"expected a chat that llama.cpp's template {name} takes, got one that it refuses")
        if count <= size:
            return buffer.raw[:count].decode(errors="replace")
        size = count
