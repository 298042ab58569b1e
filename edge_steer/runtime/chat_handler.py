"""What llama-cpp-python's chat completions render with: the model's own template as it stands, or the plain one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler

from edge_steer.chat_format import BoundedChatFormatter
from edge_steer.chat_template import PLAIN_TEMPLATE
from edge_steer.errors import SteerError

if TYPE_CHECKING:
    from edge_steer.runtime.hooked_llama import HookedLlama


def is_jinja(template: str) -> bool:
    """Whether a template is Jinja's text, not the name of one of llama.cpp's."""
    return "{" in template or "\n" in template


def make_chat_handler(llm: HookedLlama, given: str | None) -> Any:
    """A chat handler for the model's template, or the one that was `given` in its place; never another model's.

    llama-cpp-python adds no BOS to a rendered chat; where the model wants one and its template writes none, it is
    written here, so that a chat has the tokens that were calibrated on.
    """
    try:
        template = llm.chat_template
        text = template.render([{"role": "user", "content": "x"}]) if template.source else ""
    except SteerError as error:
        return partial(_refuse, str(error))  # the model may be wanted for anything but chats
    bos, adds_bos = llm.token_text(llm.token_bos()), llm._model.add_bos_token()
    lacks_bos = adds_bos and not template.starts_with_bos(text)
    if given is not None and not is_jinja(given):
        head = bos if lacks_bos else ""
        return chat_formatter_to_chat_completion_handler(
            lambda messages, **_: ChatFormatterResponse(head + template.render(messages), added_special=True)
        )
    if template.source is None:
        source, bos = PLAIN_TEMPLATE, bos if adds_bos else ""
    else:
        source = ("{{ bos_token }}" if lacks_bos else "") + template.source
    eos = llm.token_eos()
    return BoundedChatFormatter(source, llm.token_text(eos), bos, stop_token_ids=[eos]).to_chat_handler()


def _refuse(reason: str, **_: Any) -> Any:
    raise SteerError(reason)
