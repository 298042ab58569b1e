"""Ollama's own client, against the server: the answers are those of OpenAI's form, at the dials that are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")
pytest.importorskip("ollama")

import ollama
from serving import ASKED, HELLO, open_llm
from starlette.testclient import TestClient
from upstreams import listening

from edge_steer.runtime.answer import Sampling
from edge_steer.runtime.chat import generate_answer

OPTIONS: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1.0, "num_predict": 16, "num_ctx": 8192, "mirostat": 0}


@pytest.fixture(scope="module")
def own(client: TestClient) -> Iterator[Any]:
    """Ollama's client, of the same server."""
    with listening(client.app) as address:
        yield ollama.Client(host=address)


def openai_says(client: TestClient, **fields: Any) -> str:
    body = client.post("/v1/chat/completions", json={"messages": HELLO, **ASKED, **fields}).json()
    return str(body["choices"][0]["message"]["content"])


@pytest.mark.parametrize(("fields", "dials"), [
    ({}, {"happy": 20, "formal": None}),
    ({"options": {**OPTIONS, "steering": {"happy": -30}}}, {"happy": -30, "formal": None}),
    ({"options": {**OPTIONS, "steering": "formal:12"}}, {"happy": None, "formal": 12}),
    ({"options": {**OPTIONS, "steering": None}}, {"happy": None, "formal": None}),
    ({"model": "tiny@happy:-40"}, {"happy": -40, "formal": None}),
    ({"model": "tiny@off:latest"}, {"happy": None, "formal": None}),
])  # fmt: skip
def test_a_chat_says_what_openai_s_form_says_at_the_same_dials(
    own: Any, client: TestClient, fields: dict[str, Any], dials: dict[str, float | None]
) -> None:
    asked = {"model": "tiny", "options": OPTIONS, **fields}
    expected = openai_says(client, steering=dials)
    found = own.chat(messages=HELLO, **asked)
    assert found.message.content == expected
    assert found.message.role == "assistant"
    lines = list(own.chat(messages=HELLO, stream=True, **asked))
    assert "".join(line.message.content for line in lines) == expected
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert client.post("/api/chat", json={**asked, "messages": HELLO, "stream": False}).json()["steering"] == dials


def test_steering_beside_the_options_comes_before_that_within_them(client: TestClient) -> None:
    body = {"model": "tiny", "messages": HELLO, "stream": False, "options": {**OPTIONS, "steering": "happy:1"}}
    found = client.post("/api/chat", json={**body, "steering": {"happy": 2}}).json()
    assert found["steering"] == {"happy": 2, "formal": None}


def test_lines_are_streamed_unless_the_request_says_no(client: TestClient) -> None:
    body = {"model": "tiny", "messages": HELLO, "options": OPTIONS}
    streamed = client.post("/api/chat", json=body)
    assert streamed.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    whole = client.post("/api/chat", json={**body, "stream": False}).json()
    assert "".join(line["message"]["content"] for line in lines) == whole["message"]["content"]


def test_the_last_line_counts_tokens_and_nanoseconds(own: Any, model: Path) -> None:
    found = own.chat(model="tiny", messages=HELLO, options={**OPTIONS, "num_predict": 5})
    llm = open_llm(model)
    assert (found.eval_count, found.prompt_eval_count, found.done_reason) == (5, len(llm.chat_tokens(HELLO)), "length")
    llm.close()
    parts = (found.load_duration, found.prompt_eval_duration, found.eval_duration)
    assert all(isinstance(each, int) and each >= 0 for each in parts)
    assert found.prompt_eval_duration > 0
    assert sum(parts) <= found.total_duration + 20e6  # the model's thread and the server's read the clock each
    assert found.total_duration < 60e9
    assert found.created_at.endswith("Z")


def test_options_are_the_sampling_s(own: Any, model: Path) -> None:
    options = {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 7, "num_predict": 12,
               "repeat_penalty": 1.2}  # fmt: skip
    llm = open_llm(model)
    sampling = Sampling(temperature=1.5, top_k=30, top_p=0.9, min_p=0.01, seed=7, max_tokens=12, repeat_penalty=1.2)
    expected = generate_answer(llm, HELLO, sampling).text
    llm.close()
    assert own.chat(model="tiny", messages=HELLO, options=options).message.content == expected


def test_a_stop_text_ends_an_answer(own: Any, client: TestClient) -> None:
    whole = openai_says(client)
    stop = whole[4:6]
    found = own.chat(model="tiny", messages=HELLO, options={**OPTIONS, "stop": [stop]})
    assert found.message.content == whole[: whole.index(stop)]
    assert found.done_reason == "stop"


def test_generate_answers_a_prompt_by_the_chat_template(own: Any, client: TestClient) -> None:
    messages = [{"role": "system", "content": "be brief"}, *HELLO]
    found = own.generate(model="tiny", prompt=HELLO[0]["content"], system="be brief", options=OPTIONS)
    assert found.response == openai_says(client, messages=messages)
    lines = list(
        own.generate(model="tiny", prompt=HELLO[0]["content"], system="be brief", options=OPTIONS, stream=True)
    )
    assert "".join(line.response for line in lines) == found.response
    assert lines[-1].done


def test_a_raw_prompt_goes_on_as_a_completion(own: Any, client: TestClient) -> None:
    found = own.generate(model="tiny", prompt="hello there", raw=True, options=OPTIONS)
    body = client.post("/v1/completions", json={"prompt": "hello there", **ASKED}).json()
    assert found.response == body["choices"][0]["text"]


def test_an_answer_in_json_obeys_its_schema(own: Any) -> None:
    schema = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}}, "required": ["mood"]}
    found = own.chat(model="tiny", messages=HELLO, format=schema, options={**OPTIONS, "num_predict": 60})
    assert json.loads(found.message.content)["mood"] in ("good", "bad")


def test_the_model_and_its_aliases_are_listed_and_shown(own: Any, client: TestClient, model: Path) -> None:
    names = [each.model for each in own.list().models]
    assert names == [each["id"] for each in client.get("/v1/models").json()["data"]]
    assert own.list().models[0].size == model.stat().st_size
    assert own.list().models[0].details.family == "llama"
    assert len({each.digest for each in own.list().models}) == len(names)
    shown = own.show("tiny@happy:20")
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] == 512
    assert "completion" in shown.capabilities
    (running,) = own.ps().models
    assert (running.model, running.context_length) == ("tiny", 512)


def test_what_clients_look_at_first_is_there(client: TestClient) -> None:
    assert client.head("/").status_code == 200
    assert "text/html" in client.get("/").headers["content-type"]
    assert client.get("/api/version").json()["version"].count(".") == 2


def test_a_request_without_a_prompt_loads_the_model(own: Any) -> None:
    assert own.chat(model="tiny", messages=[]).done_reason == "load"
    assert own.generate(model="tiny", prompt="").done_reason == "load"


@pytest.mark.parametrize(("path", "fields", "status", "word"), [
    ("chat", {"messages": HELLO, "steering": {"sad": 1}}, 400, "'sad'"),
    ("chat", {"messages": HELLO, "model": "tiny@sad:1"}, 400, "'sad'"),
    ("chat", {"messages": HELLO, "options": {"temperature": "hot"}}, 400, "options.temperature"),
    ("chat", {"messages": HELLO, "options": {"temperature": -1}}, 400, "options.temperature"),
    ("chat", {"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, 400, "images"),
    ("generate", {"prompt": "a", "images": ["aGk="]}, 400, "images"),
    ("chat", {"messages": 3}, 400, "messages"),
    ("show", {"model": "other"}, 404, "'other'"),
    ("embed", {"input": "a"}, 501, "/api/embed"),
    ("pull", {}, 501, "/api/pull"),
])  # fmt: skip
def test_an_error_is_ollama_s(client: TestClient, path: str, fields: dict[str, Any], status: int, word: str) -> None:
    found = client.post(f"/api/{path}", json={"model": "tiny", **fields})
    assert found.status_code == status
    assert word in found.json()["error"]


def test_ollama_s_client_raises_what_the_server_says(own: Any) -> None:
    with pytest.raises(ollama.ResponseError, match="'sad'"):
        own.chat(model="tiny@sad:8", messages=HELLO)
