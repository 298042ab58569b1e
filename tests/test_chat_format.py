"""Chat templates that misbehave, that want tools, and those that llama.cpp has by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import ONE_THREAD, ran, run

pytest.importorskip("torch")
import tiny

from edge_steer import chat_format
from edge_steer.chat_format import builtin_names
from edge_steer.chat_template import ChatTemplate
from edge_steer.errors import SteerError
from edge_steer.runtime.llama import SteeredLlama

CHAT = [{"role": "user", "content": "Hello"}]
ONE: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
NEEDS_TOOLS = "{% for tool in tools %}{{ tool.name }}{% endfor %}{{ tools | length }} <|user|>{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 10**10 }}", "at most 16777216 characters, got 10000000000"),
        ("{{ 10**10 * 'x' }}", "at most 16777216 characters"),
        ("{{ 10 ** (10 ** 9) }}", "at most 16777216 characters"),
        ("{{ '%20000000d' % 1 }}", "at most 16777216 characters"),
        ("{% set n = namespace(x='xx') %}{% for i in range(90) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
         "at most 16777216 characters"),
        ("{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "at most 16777216 characters, got more"),
        ("{{ '\\ud800' }}", "half of a surrogate pair"),
        ("{{ '' }}  ", "got nothing"),
    ],
)  # fmt: skip
def test_what_a_template_writes_is_bounded_and_text(template: str, reason: str) -> None:
    with pytest.raises(SteerError, match=reason) as caught:
        ChatTemplate.from_gguf(template, "<s>", "</s>").render(CHAT)
    assert "\n" not in str(caught.value)


def test_a_hostile_template_is_not_even_compiled_unbounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(tiny, "CHAT_TEMPLATE", "{{ 'x' * 10**10 }}")
    path = tiny.build("llama", tmp_path).gguf_path
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SteerError, match="at most 16777216 characters"):
        SteeredLlama(path, **ONE).chat_tokens(CHAT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


def test_a_template_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_format, "MOST_SECONDS", 0.05)
    slow = "{% for i in range(99999) %}{% for j in range(99) %}{% endfor %}x{% endfor %}"
    with pytest.raises(SteerError, match=r"takes at most 0.05 seconds"):
        ChatTemplate.from_gguf(slow, "<s>", "</s>").render(CHAT)


def test_a_template_that_takes_tools_for_granted_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ChatTemplate.from_gguf(NEEDS_TOOLS, "<s>", "</s>").render(CHAT) == "0 <|user|>Hello"
    monkeypatch.setattr(tiny, "CHAT_TEMPLATE", NEEDS_TOOLS)
    llm = SteeredLlama(tiny.build("llama", tmp_path).gguf_path, **ONE)
    assert llm.chat_tokens(CHAT)


SYSTEM = {"role": "system", "content": "Be brief."}
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
)
DROPS = "{% for m in messages if m.role != 'system' %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"


@pytest.mark.parametrize("template", [None, REFUSES, DROPS, NEEDS_TOOLS, "chatml", "gemma"])
@pytest.mark.parametrize("chat", [CHAT, [SYSTEM, *CHAT]])
def test_chat_completions_have_the_tokens_of_the_command_line(
    model: Path, template: str | None, chat: list[dict[str, str]]
) -> None:
    llm = SteeredLlama(model, template=template, **ONE)
    seen: list[list[int]] = []
    create = llm.create_completion
    llm.create_completion = lambda prompt, **how: (seen.append(prompt), create(prompt, **how))[1]
    llm.create_chat_completion(messages=chat, max_tokens=1)
    assert seen == [llm.chat_tokens(chat)]


def test_a_template_is_told_of_the_tools_of_a_chat_completion(model: Path) -> None:
    llm = SteeredLlama(model, template="{{ tools[0].function.name }} {{ messages[0].content }}", **ONE)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert llm.chat_template.render(CHAT, tools=tools) == "weather Hello"
    used = llm.create_chat_completion(messages=CHAT, tools=tools, max_tokens=1)["usage"]
    assert used["prompt_tokens"] == len(llm.text_tokens("weather Hello"))


@pytest.mark.parametrize("template", [None, "chatml"])
def test_a_content_in_parts_of_text_is_that_text(model: Path, template: str | None) -> None:
    llm = SteeredLlama(model, template=template, **ONE)
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    assert llm.chat_tokens([{"role": "user", "content": parts}]) == llm.chat_tokens(
        [{"role": "user", "content": "Hello\nthere"}]
    )
    for content, got in (
        ([{"type": "image_url", "image_url": {"url": "x"}}], "a part of type 'image_url'"),
        (["Hello"], "a part of type 'Hello'"),
        (None, "got None"),
        (5, "got 5"),
    ):
        with pytest.raises(SteerError, match=got):
            llm.create_chat_completion(messages=[{"role": "user", "content": content}], max_tokens=1)


def test_a_model_whose_template_never_renders_loads_and_says_so_when_it_chats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "CHAT_TEMPLATE", "{{ raise_exception('no chats') }}")
    path = tiny.build("llama", tmp_path).gguf_path
    llm = SteeredLlama(path, **ONE)
    assert llm.create_completion("the", max_tokens=2)["choices"]
    with pytest.raises(SteerError, match="no chats"):
        llm.create_chat_completion(messages=CHAT)
    found = run("generate", "-m", path, "-p", "Hello", "--ctx", 256, "--max-tokens", 2, *ONE_THREAD)
    assert (found.exit_code, "no chats" in found.stderr) == (1, True)
    ran(
        "generate", "-m", path, "-p", "Hello", "--ctx", 256, "--max-tokens", 2, "--chat-template", "chatml", *ONE_THREAD
    )


def test_a_template_of_llama_cpp_is_taken_by_name(model: Path) -> None:
    assert {"chatml", "llama3", "gemma"} <= set(builtin_names())
    llm = SteeredLlama(model, template="chatml", **ONE)
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert llm.chat_template.render(CHAT) == text
    assert llm.chat_tokens(CHAT) == llm.tokenize(text.encode())
    answer = llm.create_chat_completion(messages=CHAT, max_tokens=4, temperature=0)
    expected = llm.create_completion(llm.chat_tokens(CHAT), max_tokens=4, temperature=0)
    assert answer["choices"][0]["message"]["content"] == expected["choices"][0]["text"]
    with pytest.raises(SteerError, match=r"expected a chat template's file, or one of .*chatml"):
        SteeredLlama(model, template="nonsense", **ONE).chat_tokens(CHAT)


def test_a_template_may_come_from_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert SteeredLlama(model, template="[{{ messages[0].content }}]", **ONE).chat_template.render(CHAT) == "[Hello]"
    how = ("-p", "Hello", "--ctx", 256, "--max-tokens", 2, "--json", *ONE_THREAD)
    own, given = (
        ran("generate", "-m", model, *how, *more).stdout for more in ((), ("--chat-template", tmp_path / "t.jinja"))
    )
    assert own != given
    found = run("generate", "-m", model, *how, "--chat-template", tmp_path / "none.jinja")
    assert (found.exit_code, "expected a chat template's file" in found.stderr) == (1, True)
