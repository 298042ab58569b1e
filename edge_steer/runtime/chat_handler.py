"""What llama-cpp-python's chat completions render with: the model's own template, or the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler

from edge_steer.errors import SteerError

if TYPE_CHECKING:
    from edge_steer.runtime.hooked_llama import HookedLlama, Message


def make_chat_handler(llm: HookedLlama) -> Any:
    """A chat handler that renders as `chat_tokens` does; never with another model's template.

    llama-cpp-python adds no BOS to a rendered chat; where the model wants one and its template writes none, it is
    written here, so that a chat has the tokens that were calibrated on.
    """
    try:
        template = llm.chat_template
    except SteerError as error:
        return partial(_refuse, str(error))  # the model may be wanted for anything but chats
    bos = llm.token_text(llm.token_bos()) if llm._model.add_bos_token() else ""
    eos = llm.token_text(llm.token_eos())

    def render(messages: Sequence[Message], **more: Any) -> ChatFormatterResponse:
        text = template.render(messages, **more)
        head = "" if template.starts_with_bos(text) else bos
        return ChatFormatterResponse(head + text, stop=[eos] if eos else [], added_special=True)

    return chat_formatter_to_chat_completion_handler(render)


def _refuse(reason: str, **_: Any) -> Any:
    raise SteerError(reason)
