"""In front of llama-server: a dial becomes two scales, everything else goes through, and what is amiss is one line."""

from __future__ import annotations

import json
import math
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from command import PROGRAM, process, run
from planted import random_steering
from ports import free_port
from serving import chunks
from upstreams import BASE, FORMAL, HAPPY, NO_REFUSAL, PAIR, Fake, exported, in_front_of, listening

from edge_steer import SteerError
from edge_steer.choices import Operator
from edge_steer.serve.adapters import parse_order
from edge_steer.serve.guard import Rules
from edge_steer.serve.upstream import make_upstream_app
from edge_steer.serve.upstream_start import open_upstream
from edge_steer.sites import Site
from edge_steer.steering import Steering

CHAT = "/v1/chat/completions"
ALL = [*PAIR, ("formal-cos.gguf", 0.0), ("formal-sin.gguf", 0.0)]


def hello(says: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": says}], **fields}


def turned(angle: float, first: int = 0) -> list[dict[str, Any]]:
    """What two adapters are scaled by."""
    radians = math.radians(angle)
    return [
        {"id": first, "scale": pytest.approx(math.cos(radians) - 1)},
        {"id": first + 1, "scale": pytest.approx(math.sin(radians))},
    ]


# --- the dial ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "happy", "formal"), [
    ({}, 8, 2),
    ({"steering": None}, 0, 0),
    ({"steering": ""}, 0, 0),
    ({"steering": {"happy": -12.5}}, -12.5, 0),
    ({"steering": {"happy": {"strength": 0.5}, "formal": 3}}, 10, 3),
    ({"steering": "formal:-4"}, 0, -4),
    ({"model": "tiny@happy:16"}, 16, 0),
    ({"model": "other@off"}, 0, 0),
    ({"model": "tiny"}, 8, 2),
    ({"model": "tiny@happy:16", "steering": {"formal": 1}}, 0, 1),
])  # fmt: skip
def test_the_dials_of_a_request_are_the_scales_of_its_adapters(
    fields: dict[str, Any], happy: float, formal: float
) -> None:
    fake = Fake(ALL)
    with in_front_of(fake, [HAPPY, FORMAL]) as client:
        answer = client.post(CHAT, json=hello(**fields)).json()
    (asked,) = fake.asked(CHAT)
    assert asked.json["lora"] == [*turned(happy), *turned(formal, 2)]
    assert "steering" not in asked.json
    assert "@" not in asked.json.get("model", "")
    assert answer["steering"] == {"happy": pytest.approx(happy) if happy else None,
                                  "formal": pytest.approx(formal) if formal else None}  # fmt: skip
    assert answer["choices"][0]["message"]["content"] == "{so}"


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/infill", "/v1/responses", "/chat/completions"])
def test_every_path_that_generates_is_steered(path: str) -> None:
    fake = Fake()
    with in_front_of(fake) as client:
        client.post(path, json={"prompt": "a", "steering": {"happy": 4}})
    assert fake.asked(path)[0].json == {"prompt": "a", "lora": turned(4)}


def test_adapters_of_no_steering_keep_their_scales_or_those_of_the_request() -> None:
    fake = Fake([("style.gguf", 0.75), *PAIR])
    with in_front_of(fake) as client:
        client.post(CHAT, json=hello())
        client.post(CHAT, json=hello(lora=[{"id": 0, "scale": 0.5}]))
        refused = client.post(CHAT, json=hello(lora=[{"id": 1, "scale": 0.5}]))
        assert client.post(CHAT, json=hello(lora=3)).json()["error"]["param"] == "lora"
    assert [each.json["lora"] for each in fake.asked(CHAT)] == [
        [{"id": 0, "scale": 0.75}, *turned(8, 1)],
        [{"id": 0, "scale": 0.5}, *turned(8, 1)],
    ]
    assert refused.status_code == 400
    assert "set its dial by `steering`" in refused.json()["error"]["message"]


@pytest.mark.parametrize(("fields", "word"), [
    ({"steering": {"sad": 1}}, "'sad'"),
    ({"steering": {"happy": 1e9}}, "from -360"),
    ({"model": "tiny@sad:1"}, "'sad'"),
])  # fmt: skip
def test_a_dial_that_there_is_not_never_reaches_llama_server(fields: dict[str, Any], word: str) -> None:
    fake = Fake()
    with in_front_of(fake) as client:
        answer = client.post(CHAT, json=hello(**fields))
        assert client.post(CHAT, content=b"[1]").status_code == 400
        assert client.post(CHAT, content=b"{\xff").status_code == 400
        assert client.post(CHAT, content=b'{"a":' * 100_000).status_code == 400
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]
    assert fake.asked(CHAT) == []


def test_the_default_is_set_for_requests_that_name_no_dial() -> None:
    fake = Fake()
    with in_front_of(fake) as client:
        assert client.get("/v1/steering").json()["steerings"][0]["default"] == 8
        assert client.post("/v1/steering", json={"steering": "happy:-3"}).json()["steerings"][0]["default"] == -3
        assert client.post("/v1/steering", json={"steering": "sad:-3"}).status_code == 400
        assert client.post("/v1/steering", json={}).status_code == 400
        client.post(CHAT, json=hello())
    assert fake.asked(CHAT)[0].json["lora"] == turned(-3)


def test_what_llama_server_cannot_do_is_refused_by_name() -> None:
    fake = Fake()
    with in_front_of(fake) as client:
        moved = client.post("/v1/steering/chatcmpl-1", json={"steering": {"happy": 1}})
        anthropic = client.post("/v1/messages", json=hello())
    assert (moved.status_code, moved.json()["error"]["code"]) == (409, "not_movable")
    assert (anthropic.status_code, anthropic.json()["error"]["type"]) == (501, "not_supported_error")
    assert fake.seen == []


def test_aliases_are_listed_behind_llama_server_s_own_models() -> None:
    with in_front_of(Fake()) as client:
        names = [each["id"] for each in client.get("/v1/models").json()["data"]]
    assert names == ["tiny", "tiny@off", "tiny@happy:-20", "tiny@happy:-10", "tiny@happy:10", "tiny@happy:20"]


def test_an_ablation_is_one_adapter_on_or_off(tmp_path: Path) -> None:
    fake = Fake([(exported(tmp_path, NO_REFUSAL, "whole", "any.gguf"), 0.0)])
    with in_front_of(fake, [NO_REFUSAL]) as client:
        for dial in (1, None):
            client.post(CHAT, json=hello(steering={"refusal": dial}))
    assert [each.json["lora"][0]["scale"] for each in fake.asked(CHAT)] == [1.0, 0.0]


def test_an_adapter_of_one_angle_serves_that_angle_alone(tmp_path: Path) -> None:
    fake = Fake([(exported(tmp_path, HAPPY, "whole", "any.gguf"), 0.0)])
    with in_front_of(fake) as client:
        assert client.post(CHAT, json=hello()).status_code == 200
        assert client.post(CHAT, json=hello(steering=None)).status_code == 200
        assert "expected 8 or off" in client.post(CHAT, json=hello(steering={"happy": 4})).text
        assert client.post("/v1/steering", json={"steering": {"happy": 4}}).status_code == 400
    assert [each.json["lora"] for each in fake.asked(CHAT)] == [[{"id": 0, "scale": 1.0}], [{"id": 0, "scale": 0.0}]]


# --- everything else --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
def test_any_other_path_goes_through_as_it_is(method: str) -> None:
    fake = Fake()
    with in_front_of(fake) as client:
        content = bytes(range(256)) * 1000
        headers = {"X-Mine": "ü".encode("latin-1"), "Connection": "X-Hop", "X-Hop": "1", "TE": "trailers"}
        answer = client.request(method, "/echo?a=%2F&a=2", content=content, headers=headers)
    (seen,) = fake.seen
    assert (seen.method, seen.path, seen.body) == (method, "/echo?a=%2F&a=2", content)
    assert dict(seen.headers)[b"x-mine"] == "ü".encode("latin-1")
    assert not [key for key, _ in seen.headers if key in (b"x-hop", b"te")]
    assert seen.header("host") == [fake.url.removeprefix("http://")]
    assert (answer.status_code, answer.headers["content-type"]) == (207, "application/x-odd")
    assert answer.content == content
    assert answer.headers["x-kept"] == "yes"
    assert "x-dropped" not in answer.headers
    assert "x-mine" not in answer.headers


def test_a_path_cannot_lead_to_another_host() -> None:
    fake = Fake()
    with in_front_of(fake) as client:
        for path in ("//example.com/a", "/http://example.com/", "/@example.com/", "/..%2f..%2fa"):
            assert client.get(httpx.URL(str(client.base_url)).copy_with(raw_path=path.encode())).status_code == 404
    assert [each.path for each in fake.seen] == [
        "//example.com/a", "/http://example.com/", "/@example.com/", "/..%2f..%2fa"
    ]  # fmt: skip


def test_one_client_s_cookies_and_key_are_not_another_s() -> None:
    fake = Fake()
    with in_front_of(fake) as client:
        client.post("/echo", headers={"Authorization": "Bearer a"})
        client.cookies.clear()
        client.post("/echo")
    assert [(each.header("cookie"), each.header("authorization")) for each in fake.seen] == [
        ([], ["Bearer a"]), ([], [])
    ]  # fmt: skip


def test_a_body_is_streamed_to_llama_server() -> None:
    def parts() -> Any:
        yield b"one"
        yield b"two"

    fake = Fake()
    with in_front_of(fake) as client:
        assert client.post("/echo", content=parts()).content == b"onetwo"


def test_a_stream_comes_as_it_is_made_and_tells_its_dials_first() -> None:
    fake = Fake()
    with in_front_of(fake) as client, client.stream("POST", CHAT, json=hello("slowly", stream=True)) as answer:
        lines = answer.iter_lines()
        first = next(lines)  # the fake holds the rest until it is told to go on
        assert first.startswith('data: {"steering":{"happy":8.0},"choices":')
        fake.going_on.set()
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert [json.loads(each)["choices"][0]["delta"] for each in rest[:-1]] == [{"content": "two"}, {"content": "three"}]
    assert rest[-1] == "[DONE]"
    assert "steering" not in "".join(rest)


def test_an_error_of_llama_server_goes_through() -> None:
    with in_front_of(Fake()) as client:
        answer = client.post(CHAT, json=hello("fail"))
    assert (answer.status_code, answer.json()) == (500, {"error": {"message": "no", "code": 500}})


def test_a_client_that_goes_away_ends_the_request_before_and_within_an_answer() -> None:
    fake = Fake()
    with in_front_of(fake) as client:
        with suppress(httpx.ReadTimeout):
            client.post(CHAT, json=hello("wait"), timeout=0.5)
        assert fake.cut_off.wait(10)
        fake.cut_off.clear()
        with client.stream("POST", CHAT, json=hello("forever", stream=True)) as answer:
            next(answer.iter_lines())
        assert fake.cut_off.wait(10)


def test_a_llama_server_that_dies_in_the_middle_ends_the_stream_with_an_error() -> None:
    with in_front_of(Fake()) as client:
        found = chunks(client.post(CHAT, json=hello("die", stream=True)).text)
    assert (found[-2]["error"]["code"], found[-1]) == ("upstream_lost", "[DONE]")


def test_a_lost_llama_server_is_one_502() -> None:
    fake = Fake()
    with listening(fake) as url:
        front = open_upstream(url, [HAPPY], {"happy": 8.0}, note=lambda _: None)
    with listening(make_upstream_app(front, Rules())) as address, httpx.Client(base_url=address) as client:
        for answer in (client.get("/props"), client.post(CHAT, json=hello()), client.get("/v1/models")):
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (502, "upstream_error", "upstream_lost")
            assert url in error["message"]
            assert "\n" not in error["message"]


def test_a_llama_server_that_came_back_with_other_adapters_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_steer.serve.upstream._FRESH_SECONDS", 0.0)
    fake = Fake()
    with in_front_of(fake) as client:
        fake.adapters = PAIR[::-1]
        assert client.post(CHAT, json=hello()).status_code == 200
        fake.adapters = []
        gone = client.post(CHAT, json=hello())
    cos, sin = turned(8)
    assert fake.asked(CHAT)[0].json["lora"] == [{**sin, "id": 0}, {**cos, "id": 1}]
    assert (gone.status_code, gone.json()["error"]["code"]) == (502, "adapters_changed")


# --- keys and pages ---------------------------------------------------------------------------------------------------


def test_a_client_s_key_is_handed_on_and_an_upstream_key_takes_its_place() -> None:
    notes: list[str] = []
    with in_front_of(Fake(key="k"), notes=notes) as client:
        assert client.post(CHAT, json=hello()).status_code == 401
        assert client.post(CHAT, json=hello(), headers={"Authorization": "Bearer k"}).status_code == 200
    assert "wants a key" in notes[0]
    fake = Fake(key="k")
    with in_front_of(fake, key="k", rules=Rules(key="ours")) as client:
        assert client.post(CHAT, json=hello()).status_code == 401
        assert client.get("/props").status_code == 401
        assert client.post(CHAT, json=hello(), headers={"Authorization": "Bearer ours"}).status_code == 200
    assert fake.asked(CHAT)[0].header("authorization") == ["Bearer k"]
    with pytest.raises(SteerError, match="--upstream-key"), listening(Fake(key="k")) as url:
        open_upstream(url, [HAPPY], {}, key="wrong", note=lambda _: None)


def test_the_page_and_who_may_ask_are_this_server_s_own() -> None:
    fake = Fake()
    with in_front_of(fake) as client:
        assert "text/html" in client.get("/").headers["content-type"]
        assert client.post(CHAT, json=hello(), headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.post("/echo", headers={"Origin": str(client.base_url).rstrip("/")}).status_code == 207
    assert [(each.path, each.header("origin")) for each in fake.seen][:1] == [("/echo", [])]


# --- what is looked at before the first request -----------------------------------------------------------------------


def refusal(fake: Fake, steerings: list[Steering], order: tuple[str, ...] = (), **dials: float) -> str:
    given = {each.name: dials.get(each.name) for each in steerings}
    with listening(fake) as url, pytest.raises(SteerError) as error:
        open_upstream(url, steerings, given, order=parse_order(order), note=lambda _: None)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("adapters", "order", "word"), [
    ([], (), "got a llama-server with none; start llama-server with --lora-scaled"),
    (PAIR[:1], (), "got happy-cos.gguf alone"),
    ([("a.gguf", 0.0), ("b.gguf", 0.0)], (), "tell which by --adapter happy=0,1"),
    ([("sad-cos.gguf", 0.0), ("sad-sin.gguf", 0.0)], (), "0 sad-cos.gguf, 1 sad-sin.gguf"),
    ([*PAIR, PAIR[0]], (), "expected one cos adapter"),
    (PAIR, ("happy=1,0",), "write --adapter happy=0,1"),
    (PAIR, ("happy=0,2",), "among 0, 1, got 2"),
    (PAIR, ("happy=0",), "one of a pair"),
    (PAIR, ("happy=0,0",), "happy"),
    ([("a.gguf", 0.0)], ("happy=0",), "does not say at which dial"),
    (PAIR, ("happy=0,1", "sad=0"), "got 'sad'"),
    (PAIR, ("happy",), "NAME=COS,SIN"),
    (PAIR, ("happy=a,b",), "NAME=COS,SIN"),
    (PAIR, ("happy=0,1,2",), "NAME=COS,SIN"),
])  # fmt: skip
def test_adapters_that_are_not_the_steering_s_are_told_of_before_anyone_is_served(
    adapters: list[tuple[str, float]], order: tuple[str, ...], word: str
) -> None:
    assert word in refusal(Fake(adapters), [HAPPY], order)


def test_adapters_tell_what_they_are_whatever_they_are_called(tmp_path: Path) -> None:
    other = random_steering(BASE, [Site(1, "attn_norm")], seed=9, name="happy").with_(angle=8)
    cos, sin = (exported(tmp_path, HAPPY, part, f"{name}.gguf") for part, name in (("cos", "b"), ("sin", "a")))
    fake = Fake([(sin, 0.0), (cos, 0.0)])
    with in_front_of(fake) as client:
        client.post(CHAT, json=hello())
    assert fake.asked(CHAT)[0].json["lora"] == [{**turned(8)[1], "id": 0}, {**turned(8)[0], "id": 1}]
    assert "exported from another steering called 'happy'" in refusal(Fake([(cos, 0.0), (sin, 0.0)]), [other])
    assert "another steering than 'happy'" in refusal(Fake([(cos, 0.0), (sin, 0.0)]), [other], ("happy=0,1",))


def test_adapters_of_unclear_names_are_taken_as_the_user_says() -> None:
    fake = Fake([("x.gguf", 0.0), ("b.gguf", 0.0), ("a.gguf", 0.0)])
    with in_front_of(fake, order={"happy": (2, 1)}) as client:
        client.post(CHAT, json=hello())
    scales = {each["id"]: each["scale"] for each in fake.asked(CHAT)[0].json["lora"]}
    assert scales == {0: 0, 2: turned(8)[0]["scale"], 1: turned(8)[1]["scale"]}


@pytest.mark.parametrize("operator", ["standard", "adaptive", "addition"])
def test_an_operator_that_no_adapter_can_hold_is_refused(operator: Operator) -> None:
    steering = random_steering(BASE, [Site(1, "attn_norm")], operator, name="happy")
    assert operator in refusal(Fake(), [steering])


def test_a_dial_that_no_adapter_holds_is_refused_at_the_start(tmp_path: Path) -> None:
    fake = Fake([(exported(tmp_path, HAPPY, "whole", "any.gguf"), 0.0)])
    assert "expected 8 or off" in refusal(fake, [HAPPY], happy=4.0)


def test_another_model_s_steering_is_refused() -> None:
    assert "its width is 8, that of tiny" in refusal(Fake(width=576), [HAPPY])


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://a", "http://", "http://a/?b=c", "nonsense"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SteerError, match="expected --upstream as"):
        open_upstream(url, [HAPPY], {"happy": 8.0}, note=lambda _: None)


def test_no_llama_server_and_another_server_are_told_apart() -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        await PlainTextResponse("hello", 404)(scope, receive, send)

    with listening(other) as url, pytest.raises(SteerError, match="/health answers 404"):
        open_upstream(url, [HAPPY], {"happy": 8.0}, note=lambda _: None)
    with pytest.raises(SteerError, match="start it first"):
        open_upstream(url, [HAPPY], {"happy": 8.0}, note=lambda _: None)


def test_a_llama_server_that_is_loading_is_waited_for() -> None:
    notes: list[str] = []
    with in_front_of(Fake(loading=2), notes=notes) as client:
        assert client.post(CHAT, json=hello()).status_code == 200
    assert ["is loading its model" in each for each in notes] == [True]


def test_a_cache_that_forgets_the_scales_is_not_used_and_told_of() -> None:
    notes: list[str] = []
    fake = Fake(mixes=True)
    with in_front_of(fake, notes=notes) as client:
        client.post(CHAT, json=hello(cache_prompt=True))
    assert fake.asked(CHAT)[0].json["cache_prompt"] is False
    assert "--cache-ram 0" in notes[0]
    fake = Fake()
    with in_front_of(fake, notes=notes) as client:
        client.post(CHAT, json=hello())
    assert "cache_prompt" not in fake.asked(CHAT)[0].json
    assert len(notes) == 1


def test_adapters_that_stand_elsewhere_than_at_0_and_steerings_that_share_places_are_told_of() -> None:
    notes: list[str] = []
    formal = random_steering(BASE, [Site(1, "attn_norm")], seed=1, name="formal").with_(angle=2)
    fake = Fake([(name, 1.0) for name, _ in ALL])
    with in_front_of(fake, [HAPPY, formal], notes=notes):
        pass
    assert ["do not stand at 0" in notes[0], "adapters add" in notes[1], len(notes)] == [True, True, 2]


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_stands_in_front_of_a_llama_server(tmp_path: Path) -> None:
    file = tmp_path / "happy.gguf"
    HAPPY.save(file)
    fake = Fake([(name, 1.0) for name, _ in PAIR], key="k")
    with listening(fake) as url:
        port = free_port()
        command = [*PROGRAM, "serve", "--upstream", url, "--upstream-key", "k", "-s", f"{file}:-5", "--port", str(port)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            try:
                lines = [server.stderr.readline(), server.stderr.readline()]
                assert lines[0].startswith("note: the adapters do not stand at 0")
                assert lines[1].startswith(f"serving at http://127.0.0.1:{port}")
                answer = httpx.post(f"http://127.0.0.1:{port}{CHAT}", json=hello(), trust_env=False)
            finally:
                server.terminate()
    assert answer.json()["steering"] == {"happy": -5}
    assert fake.asked(CHAT)[0].json["lora"] == turned(-5)


@pytest.mark.parametrize(("options", "word"), [
    ([], "expected -m MODEL, or --upstream URL"),
    (["--upstream", "http://127.0.0.1:1"], "expected -s FILE"),
    (["--upstream", "http://127.0.0.1:1", "-s", "a.gguf", "-m", "b.gguf"], "--model is for a model that runs here"),
    (["--upstream", "http://127.0.0.1:1", "-s", "a.gguf", "--temp", "1"], "is for a model that runs here"),
    (["-m", "a.gguf", "--adapter", "happy=0,1"], "--adapter is for --upstream"),
    (["-m", "a.gguf", "--upstream-key", "k"], "--upstream-key is for --upstream"),
])  # fmt: skip
def test_options_that_say_nothing_to_what_is_served_are_refused(options: list[str], word: str) -> None:
    found = run("serve", *options)
    assert found.exit_code == 2
    assert word in found.stderr


def test_no_llama_server_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    file = tmp_path / "happy.gguf"
    HAPPY.save(file)
    found = process("serve", "--upstream", "http://127.0.0.1:1", "-s", file, "--port", free_port())
    assert found.returncode == 1
    assert found.stderr.decode().count("\n") == 1
    assert "start it first" in found.stderr.decode()
