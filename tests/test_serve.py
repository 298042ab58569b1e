"""The server: an answer is the model's own at that dial and seed, errors are OpenAI's, nothing leaks from one request
to the next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

from serving import ASKED, GREEDY, HELLO, chunks, joined, open_llm, serving
from starlette.testclient import TestClient

from edge_steer.runtime.answer import Sampling, stream_pieces
from edge_steer.runtime.chat import generate_answer
from edge_steer.runtime.reading import TokenReadings
from edge_steer.serve.guard import Rules

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def own_answer(model: Path, happy: float | None, formal: float | None = None, sampling: Sampling = GREEDY) -> str:
    """What SteeredLlama itself answers, fresh."""
    llm = open_llm(model)
    llm.angles.update(happy=happy, formal=formal)
    text = generate_answer(llm, HELLO, sampling).text
    llm.close()
    return text


def ask(client: TestClient, **fields: Any) -> Any:
    found = client.post(CHAT, json={"messages": HELLO, **ASKED, **fields})
    assert found.status_code == 200, found.text
    return found.json()


def said(body: Any) -> str:
    return str(body["choices"][0]["message"]["content"])


# --- what is steered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "dials"), [
    ({}, (20, None)),
    ({"steering": None}, (None, None)),
    ({"steering": ""}, (None, None)),
    ({"steering": {"happy": -30}}, (-30, None)),
    ({"steering": {"happy": {"strength": -0.5}, "formal": 12}}, (-20, 12)),
    ({"steering": "happy:8,formal:-4"}, (8, -4)),
    ({"steering": "happy"}, (20, None)),
    ({"model": "tiny@happy:-40"}, (-40, None)),
    ({"model": "tiny@off"}, (None, None)),
    ({"model": "gpt-4"}, (20, None)),
    ({"model": "tiny@happy:-40", "steering": {"formal": 9}}, (None, 9)),
])  # fmt: skip
def test_an_answer_is_the_model_s_own_at_the_dials_that_the_request_names(
    model: Path, client: TestClient, fields: dict[str, Any], dials: tuple[float | None, float | None]
) -> None:
    found = ask(client, **fields)
    assert tuple(found["steering"].values()) == dials
    assert said(found) == own_answer(model, *dials)


def test_a_default_that_is_set_serves_requests_that_name_no_dial(model: Path) -> None:
    with serving(model) as client:
        shown = client.post("/v1/steering", json={"steering": {"formal": 11}}).json()
        assert [each["default"] for each in shown["steerings"]] == [20, 11]
        assert ask(client)["steering"] == {"happy": 20, "formal": 11}
        assert ask(client, steering="")["steering"] == {"happy": None, "formal": None}


def test_what_a_slider_needs_is_listed(client: TestClient) -> None:
    happy, formal = client.get("/v1/steering").json()["steerings"]
    assert (happy["min"], happy["max"], happy["default"], happy["unit"]) == (-40, 40, 20, "degrees")
    assert (formal["min"], formal["max"], formal["default"]) == (None, None, None)


def test_the_aliases_are_listed_and_can_be_asked_for_one_by_one(client: TestClient) -> None:
    names = [each["id"] for each in client.get("/v1/models").json()["data"]]
    assert names == ["tiny", "tiny@off", "tiny@happy:-40", "tiny@happy:-20", "tiny@happy:20", "tiny@happy:40"]
    assert [client.get(f"/v1/models/{name}").json()["id"] for name in names] == names
    assert client.get("/v1/models/other").status_code == 404


# --- the form of an answer --------------------------------------------------------------------------------------------


def test_a_stream_says_what_the_answer_says_and_ends_as_openai_s(client: TestClient) -> None:
    fields = {"messages": HELLO, **ASKED, "stream": True, "stream_options": {"include_usage": True}}
    found = chunks(client.post(CHAT, json=fields).text)
    whole = ask(client)
    assert joined(found) == said(whole)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert found[-3]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (found[-2]["choices"], found[-2]["usage"], found[-1]) == ([], whole["usage"], "[DONE]")
    assert len({each["id"] for each in found[:-1]}) == 1


def test_usage_counts_the_tokens(model: Path, client: TestClient) -> None:
    llm = open_llm(model)
    usage = ask(client, max_tokens=7)["usage"]
    prompt = len(llm.chat_tokens(HELLO))
    assert usage == {"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7}


def test_the_same_seed_gives_the_same_answer_and_another_another(client: TestClient) -> None:
    warm = {"temperature": 1.5, "top_p": 1, "min_p": 0, "top_k": 0}
    one, again, other = (said(ask(client, seed=seed, **warm)) for seed in (5, 5, 6))
    assert one == again != other


def test_several_answers_have_seeds_one_after_another(client: TestClient) -> None:
    warm = {"temperature": 1.5, "top_p": 1, "min_p": 0, "top_k": 0, "seed": 5}
    both = ask(client, n=2, **warm)["choices"]
    alone = [said(ask(client, **{**warm, "seed": seed})) for seed in (5, 6)]
    assert [each["message"]["content"] for each in both] == alone
    found = chunks(client.post(CHAT, json={"messages": HELLO, **ASKED, **warm, "n": 2, "stream": True}).text)
    assert [joined(found, index) for index in (0, 1)] == alone


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: TestClient) -> None:
    whole = said(ask(client))
    stop = whole[5:8]
    found = ask(client, stop=[stop, "never said"])
    assert said(found) == whole[: whole.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"
    streamed = chunks(client.post(CHAT, json={"messages": HELLO, **ASKED, "stop": stop, "stream": True}).text)
    assert joined(streamed) == whole[: whole.index(stop)]


def test_a_bias_forbids_a_token(client: TestClient) -> None:
    first = ask(client, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]["content"][0]
    llm = client.service.llm  # type: ignore[attr-defined]
    token = next(each for each in range(llm.n_vocab()) if list(llm.detokenize([each], special=True)) == first["bytes"])
    other = ask(client, logprobs=True, max_tokens=1, logit_bias={str(token): -100})
    assert other["choices"][0]["logprobs"]["content"][0]["bytes"] != first["bytes"]


def test_log_probabilities_are_those_of_the_model(model: Path, client: TestClient) -> None:
    found = ask(client, logprobs=True, top_logprobs=3, max_tokens=4)["choices"][0]["logprobs"]["content"]
    llm = open_llm(model)
    prompt = llm.chat_tokens(HELLO)
    pieces = list(stream_pieces(llm, prompt, Sampling(max_tokens=4, repeat_penalty=1, log_probabilities=3)))
    choices = [piece.choice for piece in pieces if piece.choice]
    rows = llm.logits([*prompt, *(choice.token for choice in choices)], len(prompt)).astype(float)
    expected = [row[choice.token] - np.logaddexp.reduce(row)
                for row, choice in zip(rows, choices, strict=True)]  # fmt: skip
    assert [each["logprob"] for each in found] == pytest.approx(expected, abs=1e-4)
    assert all(each["top_logprobs"][0]["logprob"] == each["logprob"] for each in found)  # greedy: the likeliest


def test_a_schema_is_kept_to(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    found = ask(client, response_format=wanted, max_tokens=40)
    assert json.loads(said(found))["a"] in ("x", "y")


@pytest.mark.parametrize("prompt", ["hello", [104, 101, 108, 108, 111], ["hello", "there"]])
def test_a_text_goes_on(client: TestClient, prompt: Any) -> None:
    fields = {"prompt": prompt, **ASKED, "logprobs": 2}
    body = client.post(TEXT, json=fields).json()
    streamed = chunks(client.post(TEXT, json={**fields, "stream": True}).text)
    for choice in body["choices"]:
        parts = [each["choices"][0] for each in streamed[:-1]]
        assert "".join(p["text"] for p in parts if p["index"] == choice["index"]) == choice["text"] != ""
        assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) > 0
    echoed = client.post(TEXT, json={**ASKED, "prompt": "hello", "echo": True}).json()["choices"][0]["text"]
    assert echoed.startswith("hello")


@pytest.fixture(scope="module")
def reading(model: Path) -> Iterator[TestClient]:
    """A client of a server whose steerings can be read."""
    with serving(model) as client:
        llm = client.service.llm  # type: ignore[attr-defined]
        apart = [each.with_(class_means=[[-1.0, 2.0]] * len(each.sites)) for each in llm.steerings]
        llm.token_readings = TokenReadings(llm._hook, apart, llm.n_ctx())
        yield client


def test_readings_come_with_an_answer_where_they_are_asked_for(model: Path, reading: TestClient) -> None:
    plain = ask(reading)
    found = ask(reading, read=True)
    assert said(found) == said(plain)
    assert "readings" not in plain["choices"][0]
    read = found["choices"][0]["readings"]
    count = found["usage"]["completion_tokens"]
    assert list(read) == ["happy", "formal"]
    assert len(read["happy"]["tokens"]) == len(read["formal"]["tokens"]) == count
    llm = reading.service.llm  # type: ignore[attr-defined]
    prompt = llm.token_readings.first("happy", found["usage"]["prompt_tokens"])[1:]
    assert read["happy"]["prompt"] == pytest.approx(prompt.mean(), abs=1e-4)
    streamed = chunks(reading.post(CHAT, json={"messages": HELLO, **ASKED, "read": True, "stream": True}).text)
    told = [each["choices"][0].get("readings") for each in streamed[:-1]]
    assert [each["happy"] for each in told if each] == read["happy"]["tokens"]
    assert joined(streamed) == said(plain)
    fields = {"prompt": "hello", **ASKED, "read": True}
    text = reading.post(TEXT, json=fields).json()["choices"][0]
    parts = [each["choices"][0] for each in chunks(reading.post(TEXT, json={**fields, "stream": True}).text)[:-1]]
    assert [p["readings"]["formal"] for p in parts if "readings" in p] == text["readings"]["formal"]["tokens"]


def test_readings_of_a_file_without_class_means_are_refused(client: TestClient) -> None:
    found = client.post(CHAT, json={"messages": HELLO, "read": True})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "read"
    assert "calibrate it again" in found.json()["error"]["message"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "param"), [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"max_tokens": True}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"stop": [""]}, "stop"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
    ({"steering": {"sad": 3}}, "steering"),
    ({"steering": {"happy": "much"}}, "steering"),
    ({"steering": {"happy": 1e300}}, "steering"),
    ({"steering": 8}, "steering"),
    ({"steering": {"formal": {"strength": 0.5}}}, "steering"),
    ({"model": "tiny@sad:3"}, "model"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object", "schema": {"$ref": "http://a/b"}}}, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
])  # fmt: skip
def test_a_wrong_field_is_refused_by_its_name(client: TestClient, fields: dict[str, Any], param: str) -> None:
    found = client.post(CHAT, json={"messages": HELLO, **fields})
    error = found.json()["error"]
    assert (found.status_code, error["type"]) == (400, "invalid_request_error"), found.text
    assert str(error["param"]).startswith(param)
    assert "\n" not in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"messages": NaN}', b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_request_is_refused(client: TestClient, body: bytes) -> None:
    found = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    assert found.json()["error"]["message"]


def test_a_grammar_that_does_not_parse_is_refused_without_harm(model: Path, client: TestClient) -> None:
    found = client.post(TEXT, json={"prompt": "x", "grammar": "root ::= ("})
    assert (found.status_code, "grammar" in found.json()["error"]["message"]) == (400, True)
    assert said(ask(client)) == own_answer(model, 20)


def test_an_unknown_path_is_404_in_openai_s_form(client: TestClient) -> None:
    found = client.get("/v1/nothing")
    assert (found.status_code, set(found.json()["error"])) == (404, {"message", "type", "param", "code"})


def test_an_answer_that_is_over_cannot_be_moved(client: TestClient) -> None:
    found = client.post(f"/v1/steering/{ask(client)['id']}", json={"steering": {"happy": 1}})
    assert found.status_code == 404


def test_the_key_is_asked_for_everywhere_but_where_there_is_nothing_to_take(model: Path) -> None:
    with serving(model, Rules(key="s3cret")) as client:
        assert ask(client)["choices"]
        for key in ("", "Bearer", "Bearer wrong", "Bearer s3cret2", "Basic s3cret", "Bearer \xe9"):
            headers = {"Authorization": key.encode("latin-1")}
            for path in ("/v1/models", "/v1/steering", "/openapi.json", "/props", "//v1/models", "/page/../v1/models"):
                assert client.get(path, headers=headers).status_code == 401, (path, key)  # type: ignore[arg-type]
            assert client.get("/health", headers=headers).status_code == 200  # type: ignore[arg-type]


@pytest.mark.parametrize(("headers", "status"), [
    ({"Host": "localhost:8080"}, 200),
    ({"Host": "127.0.0.1"}, 200),
    ({"Host": "[::1]:8080"}, 200),
    ({"Host": "laptop.home"}, 200),
    ({"Host": "evil.example"}, 421),
    ({"Host": "localhost.evil.example"}, 421),
    ({"Host": "127.0.0.1.evil.example"}, 421),
    ({"Host": "localhost", "Origin": "http://localhost"}, 200),
    ({"Host": "localhost", "Origin": "http://friend.example"}, 200),
    ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
    ({"Host": "localhost", "Origin": "null"}, 403),
])  # fmt: skip
def test_pages_of_others_cannot_ask(model: Path, headers: dict[str, str], status: int) -> None:
    with serving(model, Rules(hosts=("laptop.home",), origins=("http://friend.example",))) as client:
        found = client.get("/v1/models", headers=headers)
        assert found.status_code == status
        friend = "friend" in headers.get("Origin", "")
        assert (found.headers.get("access-control-allow-origin") is not None) == friend


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(model: Path) -> None:
    with serving(model, Rules(body_bytes=1000)) as client:
        assert client.post(CHAT, content=b"x" * 1001).status_code == 413

        def parts() -> Iterator[bytes]:
            for _ in range(50):
                yield b" " * 100

        assert client.post(CHAT, content=parts(), headers={"Content-Type": "application/json"}).status_code == 413
        assert ask(client)["choices"]


# --- when it acts -----------------------------------------------------------------------------------------------------


def gated_answer(model: Path, gate: str) -> str:
    """What SteeredLlama itself answers with happy under a gate."""
    llm = open_llm(model)
    llm.angles.update(happy=30, formal=None)
    llm.gates["happy"] = gate
    text = generate_answer(llm, HELLO, GREEDY).text
    llm.close()
    return text


def test_a_request_says_when_a_steering_acts_and_the_next_one_is_as_before(client: TestClient, model: Path) -> None:
    before = said(ask(client, steering={"happy": 30}))
    expected = gated_answer(model, "@after:3")
    assert expected != before
    for given in (
        {"steering": {"happy": {"angle": 30, "when": "@after:3"}}},
        {"steering": "happy:30@after:3"},
        {"model": "tiny@happy:30@after:3"},
    ):
        found = ask(client, **given)
        assert said(found) == expected
        assert found["steering"] == {"happy": {"angle": 30, "when": "@after:3"}, "formal": None}
    assert said(ask(client, steering={"happy": 30})) == before
    assert said(ask(client, steering={"happy": {"angle": 30, "when": ""}})) == before


def test_a_strength_or_the_files_default_may_have_a_gate(client: TestClient) -> None:
    gated = "@first:2"
    assert ask(client, steering={"happy": {"strength": 0.5, "when": gated}})["steering"]["happy"]["angle"] == 20
    assert ask(client, steering={"happy": {"when": gated}})["steering"]["happy"] == {"angle": 20, "when": gated}
    assert ask(client, steering="happy@first:2, formal:3")["steering"]["happy"] == {"angle": 20, "when": gated}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"happy": {"angle": 8, "when": "@frst:3"}}, "did you mean @first?"),
        ({"happy": {"angle": 8, "when": 3}}, "expected a gate such as @response"),
        ({"happy": {"angle": 8, "when": ["@response"]}}, "expected a gate such as @response"),
        ({"happy": {"angle": 8, "when": "@when sad>1"}}, "expected a steering among happy, formal, got 'sad'"),
        ({"happy": {"angle": 8, "when": "@thinking"}}, "expected a model that marks its thinking"),
        ("sad:8@response", "expected a steering among happy, formal, got 'sad'"),
        ("happy:8@first:0", "expected @first:N with N from 1"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_in_a_line(client: TestClient, given: Any, expected: str) -> None:
    found = client.post(CHAT, json={"messages": HELLO, **ASKED, "steering": given})
    assert found.status_code == 400
    assert expected in found.json()["error"]["message"]
    assert found.json()["error"]["param"] == "steering"


def test_the_servers_own_gates_hold_where_a_request_names_none(model: Path) -> None:
    with serving(model) as client:
        assert client.get("/v1/steering").json()["steerings"][0]["when"] is None
        found = client.post("/v1/steering", json={"steering": {"happy": {"angle": 30, "when": "@after:3"}}})
        assert found.json()["steerings"][0]["when"] == "@after:3"
        expected = gated_answer(model, "@after:3")
        assert said(ask(client)) == said(ask(client, steering={"happy": 30})) == expected
        assert said(ask(client, steering={"happy": {"angle": 30, "when": "@all"}})) != expected
