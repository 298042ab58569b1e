"""The server as clients that others wrote see it: openai, langchain-openai, litellm, llm.

A client that is not installed is skipped, and said so (they are in the extra `clients`, which the gate installs).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

from serving import HELLO, open_llm, server_at

from edge_steer.runtime.answer import Sampling
from edge_steer.runtime.chat import generate_answer

LONGEST = 16
TEMPLATE_WITH_TOOLS = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }} <tool_call>{% endfor %}"
    "{% for message in messages %}<|{{ message['role'] if message['role'] != 'tool' else 'user' }}|>"
    "{{ message['content'] or '' }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look somewhere.",
            "parameters": {"type": "object", "properties": {"at": {"enum": ["up", "down"]}}, "required": ["at"]},
        },
    }
]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE_WITH_TOOLS)
    options = ("--api-key", "k3y", "--chat-template", str(template), "--repeat-penalty", "1")
    with server_at(model, folder, *options, max_tokens=LONGEST) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[float | None, str]:
    """What SteeredLlama itself answers at dials of `happy`."""
    llm = open_llm(model)
    found = {}
    for dial in (None, -40, 20, 40):
        llm.angles.update(happy=dial, formal=None)
        found[dial] = generate_answer(llm, HELLO, Sampling(max_tokens=LONGEST, repeat_penalty=1.0)).text
    assert len(set(found.values())) > 2  # the dials tell
    return found


# --- openai -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai(server: str) -> Any:
    return pytest.importorskip("openai").OpenAI(base_url=server, api_key="k3y", max_retries=0)


def test_openai_asks_and_streams(openai: Any, expected: dict[float | None, str]) -> None:
    for dial, text in expected.items():
        asked = {"model": "tiny", "messages": HELLO, "extra_body": {"steering": {"happy": dial}}}
        found = openai.chat.completions.create(**asked)
        assert found.choices[0].message.content == text
        assert found.steering["happy"] == dial
        assert found.usage.completion_tokens <= LONGEST
        stream = openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == text
        assert chunks[-1].usage == found.usage


def test_openai_s_streaming_helper_gathers_the_same(openai: Any, expected: dict[float | None, str]) -> None:
    stop = expected[40][8:10]  # it refuses an answer that max_tokens ended
    with openai.chat.completions.stream(model="tiny@happy:40", messages=HELLO, stop=stop) as stream:
        text = stream.get_final_completion().choices[0].message.content
    assert text == expected[40][: expected[40].index(stop)]


def test_openai_asynchronously(server: str, expected: dict[float | None, str]) -> None:
    client = pytest.importorskip("openai").AsyncOpenAI(base_url=server, api_key="k3y", max_retries=0)

    async def ask() -> list[str]:
        names = [f"tiny@happy:{dial}" if dial else "tiny@off" for dial in expected]
        answers = (client.chat.completions.create(model=name, messages=HELLO) for name in names)
        return [each.choices[0].message.content for each in await asyncio.gather(*answers)]

    assert asyncio.run(ask()) == list(expected.values())


def test_openai_lists_models_and_completes_text(openai: Any) -> None:
    assert "llama@happy:40" in [model.id for model in openai.models.list()]
    found = openai.completions.create(model="tiny", prompt="hello", logprobs=2)
    assert len(found.choices[0].logprobs.tokens) == found.usage.completion_tokens
    streamed = openai.completions.create(model="tiny", prompt="hello", stream=True)
    assert "".join(each.choices[0].text for each in streamed) == found.choices[0].text


def test_openai_calls_a_tool_and_goes_on_from_its_answer(openai: Any) -> None:
    asked = {"model": "tiny", "tools": TOOLS, "max_tokens": 100, "messages": HELLO}
    call = openai.chat.completions.create(**asked, tool_choice="required").choices[0]
    assert call.finish_reason == "tool_calls"
    assert json.loads(call.message.tool_calls[0].function.arguments)["at"] in ("up", "down")
    streamed = [
        each.choices[0] for each in openai.chat.completions.create(**asked, tool_choice="required", stream=True)
    ]
    called = [each.delta.tool_calls[0] for each in streamed if each.delta.tool_calls]
    assert [each.function.arguments for each in called] == [call.message.tool_calls[0].function.arguments]
    messages = [*HELLO, call.message, {"role": "tool", "tool_call_id": call.message.tool_calls[0].id, "content": "sky"}]
    assert openai.chat.completions.create(model="tiny", tools=TOOLS, messages=messages).choices[0].message.role


def test_openai_parses_a_structured_answer(openai: Any) -> None:
    from typing import Literal

    from pydantic import BaseModel

    class Direction(BaseModel):
        at: Literal["up", "down"]

    found = openai.chat.completions.parse(model="tiny", messages=HELLO, response_format=Direction, max_tokens=60)
    assert found.choices[0].message.parsed.at in ("up", "down")


def test_openai_s_errors_are_of_its_kinds(server: str, openai: Any) -> None:
    import openai as library

    with pytest.raises(library.BadRequestError) as found:
        openai.chat.completions.create(model="tiny", messages=HELLO, extra_body={"steering": {"sad": 1}})
    assert found.value.param == "steering"
    with pytest.raises(library.AuthenticationError):
        library.OpenAI(base_url=server, api_key="wrong", max_retries=0).models.list()
    with pytest.raises(library.NotFoundError):
        openai.models.retrieve("other")


# --- others -----------------------------------------------------------------------------------------------------------


def test_langchain(server: str, expected: dict[float | None, str]) -> None:
    library = pytest.importorskip("langchain_openai")
    chat = library.ChatOpenAI(base_url=server, api_key="k3y", model="tiny", extra_body={"steering": "happy:-40"})
    assert chat.invoke(HELLO).content == expected[-40]
    assert "".join(str(chunk.content) for chunk in chat.stream(HELLO)) == expected[-40]
    call = chat.bind_tools(TOOLS, tool_choice="look").invoke(HELLO, max_tokens=100).tool_calls[0]
    assert (call["name"], call["args"]["at"] in ("up", "down")) == ("look", True)


def test_litellm(server: str, expected: dict[float | None, str]) -> None:
    library = pytest.importorskip("litellm")
    asked = {"model": "openai/tiny@happy:40", "api_base": server, "api_key": "k3y", "messages": HELLO}
    assert library.completion(**asked).choices[0].message.content == expected[40]
    streamed = library.completion(**asked, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in streamed) == expected[40]


def test_llm(server: str, expected: dict[float | None, str], tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: steered\n  model_name: tiny@happy:40\n  api_base: {server}\n  api_key_name: steered\n"
    )
    command = [sys.executable, "-m", "llm", "-m", "steered", "--key", "k3y", "--no-log", HELLO[0]["content"]]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == expected[40].strip()
