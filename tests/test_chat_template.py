"""Chat templates: the same text from a GGUF and from transformers, the plain one, and those that refuse."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from edge_steer.chat_template import ChatTemplate
from edge_steer.errors import SteerError
from edge_steer.prompts import Prompt

GEMMA_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<model>"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
]


class Tokenizer:
    """The part of a transformers tokenizer that ChatTemplate asks for."""

    bos_token = None

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        import jinja2

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        assert not tokenize
        template = jinja2.Environment().from_string(self.chat_template or "")
        return template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            raise_exception=raise_exception,
            bos_token="",
        )


def both(template: str | None) -> list[ChatTemplate]:
    return [ChatTemplate.from_gguf(template, "", "</s>"), ChatTemplate.from_tokenizer(Tokenizer(template))]


def test_a_model_without_a_template_gets_the_plain_one() -> None:
    for template in (*both(None), *both("")):
        assert template.is_plain
        assert template.prompt_text(Prompt("Why?")) == "Why?\nAnswer:"
        assert template.prompt_text(Prompt("Why?", "Be brief.", " Because")) == "Be brief.\n\nWhy?\nAnswer: Because"
        assert template.render(CHAT) == "Be brief.\n\nQ1\nAnswer: A1\n\nQ2\nAnswer:"
        assert template.render([*CHAT[:2], {"role": "assistant", "content": " A1\n"}, CHAT[3]]) == template.render(CHAT)
        with pytest.raises(SteerError, match="got tool"):
            template.render([{"role": "tool", "content": "x"}])


def test_a_template_that_refuses_or_drops_the_system_role_gets_its_text_in_the_first_user_message() -> None:
    for template in both(GEMMA_LIKE):
        assert template.render(CHAT) == "<user>Be brief.\n\nQ1</><assistant>A1</><user>Q2</><model>"
        assert template.render(CHAT[:1]) == "<user>Be brief.</><model>"
        assert template.prompt_text(Prompt("Q1", None, " Well")) == "<user>Q1</><model> Well"
    for template in both(DROPS_SYSTEM):
        assert template.render(CHAT) == "<user>Be brief.\n\nQ1<assistant>A1<user>Q2<model>"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no\nway') }}", "{{ 1 / 0 }}", "{{ messages[9]['role'] }}", "{{ 'a' + 1 }}", "{{ x.y.z }}",
     "{{ ''.__class__.__mro__[1].__subclasses__() }}"],
)  # fmt: skip
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:]])
def test_a_template_that_fails_is_a_one_line_error(template: str, chat: list[dict[str, str]]) -> None:
    with pytest.raises(SteerError, match="expected a chat template that renders") as caught:
        ChatTemplate.from_gguf(template, "", "").render(chat)
    assert "\n" not in str(caught.value)


def test_a_template_that_does_not_compile_is_a_one_line_error() -> None:
    with pytest.raises(SteerError, match="expected a chat template that renders"):
        ChatTemplate.from_gguf("{% for %}", "", "")


def test_templates_are_frozen_values_equal_by_their_text() -> None:
    first, second = (ChatTemplate.from_gguf(GEMMA_LIKE, "<bos>", "") for _ in range(2))
    assert first == second != ChatTemplate.from_gguf(DROPS_SYSTEM, "<bos>", "")
    with pytest.raises(FrozenInstanceError):
        first.source = None  # type: ignore[misc]


def test_a_text_starts_with_the_bos_only_where_there_is_one() -> None:
    template = ChatTemplate.from_gguf(GEMMA_LIKE, "<bos>", "")
    assert template.starts_with_bos(template.render(CHAT))
    assert not ChatTemplate.from_gguf(DROPS_SYSTEM, "<bos>", "").starts_with_bos("<user>")
    assert not ChatTemplate.from_gguf(None, "", "").starts_with_bos("Q1")


# --- on real models -----------------------------------------------------------------------------------------------

PROMPTS = [Prompt("Wie geht's, 2024?"), Prompt("Hi!", "Be brief."), Prompt("Hi!", "Be brief.", " Well,")]


def loaded(path: Path) -> tuple[Any, str, ChatTemplate]:
    """The vocabulary of a GGUF, its BOS text and its template."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    bos, eos = (llm._model.token_get_text(token) for token in (llm.token_bos(), llm.token_eos()))
    return llm, bos, ChatTemplate.from_gguf(llm.metadata.get("tokenizer.chat_template"), bos, eos)


def tokens(llm: Any, template: ChatTemplate, text: str) -> list[int]:
    found: list[int] = llm.tokenize(text.encode(), add_bos=not template.starts_with_bos(text), special=True)
    return found


def fed(llm: Any, handler: Any, messages: list[dict[str, str]]) -> list[int]:
    """The tokens that llama-cpp-python's chat handler hands to create_completion."""
    seen: list[list[int]] = []

    def create_completion(prompt: list[int], **options: Any) -> dict[str, Any]:
        seen.append(prompt)
        choice = {"text": "", "index": 0, "logprobs": None, "finish_reason": "stop"}
        return {"id": "x", "object": "text_completion", "created": 0, "model": "x", "choices": [choice], "usage": {}}

    llm.create_completion = create_completion
    handler(llama=llm, messages=messages)
    return seen[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_smollm2_gets_the_tokens_of_create_chat_completion(smollm2: Path, prompt: Prompt) -> None:
    llm, _, template = loaded(smollm2)
    text = template.render(prompt.messages())
    assert not template.is_plain
    assert text.endswith("<|im_start|>assistant\n")
    assert text.count("<|im_start|>system") == 1
    assert tokens(llm, template, text) == fed(llm, llm._chat_handlers[llm.chat_format], prompt.messages())


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_transformers_and_llama_cpp_write_the_same_text_and_tokens(model: str, request: pytest.FixtureRequest) -> None:
    transformers = pytest.importorskip("transformers")
    path: Path = request.getfixturevalue(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    llm, _, native = loaded(path)
    torch = ChatTemplate.from_tokenizer(tokenizer)
    assert torch == native
    # SmolLM2's tokenizer comes out of its GGUF without digit splitting: no digits here.
    for prompt in (Prompt("Wie geht's?"), *PROMPTS[1:]):
        text = torch.prompt_text(prompt)
        assert text == native.prompt_text(prompt)
        ids = tokenizer(text, add_special_tokens=not torch.starts_with_bos(text))["input_ids"]
        assert ids == tokens(llm, native, text)
