"""llama-server's own ways of asking: what its clients send, and what they read of the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

from serving import ASKED, HELLO, chunks, open_llm, serving
from starlette.testclient import TestClient

GREEDY: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1.0, "n_predict": 12}


def asked(client: TestClient, path: str, body: Any) -> Any:
    found = client.post(path, json=body)
    assert found.status_code == 200, found.text
    return found.json()


@pytest.mark.parametrize("steering", [{"happy": -30}, "formal:9", None])
def test_a_completion_says_what_openai_s_form_says(client: TestClient, steering: Any) -> None:
    body = {"prompt": "hello there", **GREEDY, "steering": steering}
    found = asked(client, "/completion", body)
    expected = asked(
        client, "/v1/completions", {"prompt": "hello there", **ASKED, "max_tokens": 12, "steering": steering}
    )
    assert found["content"] == expected["choices"][0]["text"]
    assert found["steering"] == expected["steering"]
    assert (found["stop"], found["stop_type"], found["tokens_predicted"]) == (True, "limit", 12)
    assert found["tokens_evaluated"] == found["timings"]["prompt_n"] == expected["usage"]["prompt_tokens"]
    assert found["timings"]["predicted_ms"] > 0


def test_a_stream_of_it_ends_with_stop(client: TestClient) -> None:
    body = {"prompt": "hello there", **GREEDY}
    found = chunks(client.post("/completion", json={**body, "stream": True}).text)
    assert "".join(each["content"] for each in found) == asked(client, "/completion", body)["content"]
    assert [each["stop"] for each in found] == [False] * (len(found) - 1) + [True]
    assert found[-1]["stop_type"] == "limit"


def test_tokens_are_a_prompt_too(client: TestClient) -> None:
    tokens = asked(client, "/tokenize", {"content": "hello there", "add_special": True})["tokens"]
    bodies = [asked(client, "/completion", {"prompt": prompt, **GREEDY}) for prompt in ("hello there", tokens)]
    assert bodies[0]["content"] == bodies[1]["content"]
    assert client.post("/completion", json={"prompt": [10**6], **GREEDY}).status_code == 400


def test_probabilities_and_schemas(client: TestClient) -> None:
    found = asked(client, "/completion", {"prompt": "hello", **GREEDY, "n_predict": 3, "n_probs": 2})
    told = found["completion_probabilities"]
    assert [len(each["top_logprobs"]) for each in told] == [2, 2, 2]
    assert all(each["logprob"] <= each["top_logprobs"][0]["logprob"] <= 0 for each in told)
    schema = {"enum": ["yes", "no"]}
    found = asked(client, "/completion", {"prompt": "hello", **GREEDY, "json_schema": schema})
    assert found["content"].strip() in ('"yes"', '"no"')


@pytest.mark.parametrize("text", ["hello there", "ä 🙂 <s>", ""])
def test_what_is_tokenized_is_told_back(client: TestClient, model: Path, text: str) -> None:
    body = {"content": text, "parse_special": False}
    tokens = asked(client, "/tokenize", body)["tokens"]
    llm = open_llm(model)
    assert tokens == (llm.tokenize(text.encode(), add_bos=False, special=False) if text else [])
    llm.close()
    assert asked(client, "/detokenize", {"tokens": tokens})["content"].strip() == text.strip()
    pieces = asked(client, "/tokenize", {**body, "with_pieces": True})["tokens"]
    assert [each["id"] for each in pieces] == tokens
    joined = b"".join(p.encode() if isinstance(p := each["piece"], str) else bytes(p) for each in pieces)
    assert joined.decode().strip() == text.strip()


def test_a_token_that_there_is_not_is_refused(client: TestClient) -> None:
    found = client.post("/detokenize", json={"tokens": [10**6]})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "tokens")
    assert client.post("/detokenize", json={"tokens": [-1]}).status_code == 400


def test_a_chat_s_text_is_that_of_the_template(client: TestClient, model: Path) -> None:
    llm = open_llm(model)
    assert asked(client, "/apply-template", {"messages": HELLO})["prompt"] == llm.chat_template.render(HELLO)
    llm.close()
    assert client.post("/apply-template", json={"messages": []}).status_code == 400


def test_the_properties_name_the_context_and_no_folder(client: TestClient, model: Path) -> None:
    found = client.get("/props").json()
    assert (found["n_ctx"], found["total_slots"], found["model_path"]) == (512, 1, model.name)
    assert found["default_generation_settings"]["params"]["temperature"] == 0
    assert str(model.parent) not in client.get("/props").text


def test_counts_are_told_where_they_are_asked_for(client: TestClient, model: Path) -> None:
    assert client.get("/metrics").status_code == 501
    with serving(model, metrics=True) as counting:
        asked(counting, "/completion", {"prompt": "hello there", **GREEDY})
        found = counting.get("/metrics")
    lines = dict(line.split(" ") for line in found.text.splitlines() if not line.startswith("#"))
    assert found.headers["content-type"].startswith("text/plain")
    assert lines["llamacpp:tokens_predicted_total"] == "12"
    assert int(lines["llamacpp:prompt_tokens_total"]) > 1
    assert lines["llamacpp:requests_processing"] == lines["llamacpp:requests_deferred"] == "0"
