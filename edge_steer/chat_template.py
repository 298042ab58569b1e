"""How a model wants its chat written: the template that it brought, or the plain form of one that brought none.

Tokens. Both recorders and generation must see the same ones, so a rendered text is tokenized in one way:

    llama.cpp     SteeredLlama.text_tokens
    transformers  TorchRecorder.text_tokens

Most templates write the BOS themselves and must not get another; where the text has none, the tokenizer adds its own,
if it is one that does. Nothing else that it may add belongs to a prompt: an EOS behind it would end the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_steer.errors import SteerError, quote
from edge_steer.prompts import Prompt

# Contents are stripped: a model begins its answer with a space of its own, and two would be other tokens than it wrote.
PLAIN_TEMPLATE_NOTE = 'this model has no chat template; prompts are put as "{prompt}\\nAnswer:"'
PLAIN_FORMS = {"system": "{}\n\n", "user": "{}\nAnswer:", "assistant": " {}\n\n"}


@dataclass(frozen=True)
class ChatTemplate:
    """How a model wants its chat written. Made by `from_gguf` or `from_tokenizer`.

    source: the Jinja text, or the name of one of llama.cpp's; None for the plain template. bos_token: text of the BOS,
    "" where the model has none.
    """

    source: str | None
    bos_token: str
    _write: Callable[..., str] = field(repr=False, compare=False)

    @classmethod
    def from_gguf(cls, template: str | None, bos_token: str, eos_token: str) -> ChatTemplate:
        """The template in a GGUF's `tokenizer.chat_template`, rendered as llama-cpp-python does; None: the plain one.

        Raises SteerError if the template does not compile.
        """
        if not template:
            return cls(None, bos_token, _plain)
        from edge_steer.chat_format import BoundedChatFormatter

        try:
            formatter = BoundedChatFormatter(template, eos_token, bos_token)
        except _template_errors() as error:
            raise _broken(error) from None

        def write(messages: list[dict[str, Any]], **more: Any) -> str:
            try:
                return str(formatter(messages=messages, **more).prompt)
            except _template_errors() as error:
                if more.get("tools") is not None:
                    raise
                try:  # templates of models that call tools may take a list of them for granted
                    return str(formatter(messages=messages, **{**more, "tools": []}).prompt)
                except _template_errors():
                    raise error from None

        return cls(template, bos_token, write)

    @classmethod
    def builtin(cls, name: str, bos_token: str) -> ChatTemplate:
        """llama.cpp's own template `name`. Raises SteerError that lists them."""
        from edge_steer.chat_format import apply_builtin, builtin_names

        if name not in builtin_names():
            raise SteerError(
                f"expected a chat template's file, or one of {', '.join(builtin_names())}, got {quote(name)}"
            )
        return cls(name, bos_token, lambda messages, **_: apply_builtin(name, messages))

    @classmethod
    def from_tokenizer(cls, hf_tokenizer: Any) -> ChatTemplate:
        """The template of a transformers tokenizer; the plain one where it has none."""
        bos_token, template = hf_tokenizer.bos_token or "", hf_tokenizer.chat_template
        if not template:
            return cls(None, bos_token, _plain)

        def write(messages: list[dict[str, Any]], **_: Any) -> str:
            return str(hf_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

        return cls(str(template), bos_token, write)

    @property
    def is_plain(self) -> bool:
        """Whether the model brought no template."""
        return self.source is None

    def starts_with_bos(self, text: str) -> bool:
        """Whether `text` begins with the BOS already, so that the tokenizer must not add one."""
        return bool(self.bos_token) and text.startswith(self.bos_token)

    def render(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        """The text of a chat, generation prompt included. Raises SteerError if the template fails.

        A template without a system role (Gemma refuses it, others drop it) gets its text at the head of the first
        user message, a blank line between. A content in parts of text is one text, a line each.
        more: what else a Jinja template may ask for, such as tools.
        """
        chat = [_with_text(message) for message in messages]
        errors = _template_errors()
        system = chat[0]["content"] if chat and chat[0].get("role") == "system" else None
        try:
            text = self._write(chat, **more)
            if system is None or system.strip() in text:
                return text
        except errors as error:
            if system is None:
                raise _broken(error) from None
        try:
            return self._write(_fold_system(chat), **more)
        except errors as error:
            raise _broken(error) from None

    def prompt_text(self, prompt: Prompt) -> str:
        """The text to record: the rendered prompt, and how the answer begins."""
        return self.render(prompt.messages()) + (prompt.prefix or "")


def _with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates want it, which write a list as Python does, and None as a word."""
    content = message.get("content")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, Mapping) else part for part in content]
        if others := [kind for kind in kinds if kind != "text"]:
            raise SteerError(f"expected a message of text, got a part of type {quote(others[0])}; leave it out")
        content = "\n".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) and message.get("role") in ("system", "user"):
        raise SteerError(f"expected text as content of a {message['role']} message, got {quote(content)}")
    return {**message, "content": content}


def _fold_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`chat` with its system message, the first, moved into the user message after it."""
    system, *rest = chat
    if not rest:
        return [{**system, "role": "user"}]
    return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _plain(messages: list[dict[str, Any]], **_: Any) -> str:
    """`{prompt}\\nAnswer:`, for a model without a template."""
    text = ""
    for message in messages:
        form = PLAIN_FORMS.get(message["role"])
        if form is None:
            raise ValueError(f"expected role {', '.join(PLAIN_FORMS)}, got {message['role']}")
        text += form.format(message["content"].strip())
    return text


def _template_errors() -> tuple[type[Exception], ...]:
    """What rendering can raise. A template is a program from a file: it can add text to None or divide by 0."""
    from jinja2 import TemplateError

    return (
        TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
    )  # fmt: skip


def _broken(error: Exception) -> SteerError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return SteerError(f"expected a chat template that renders, got {reason[:200]}; check the model's chat template")
