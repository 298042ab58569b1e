"""The server as a process: dials that move while it talks, clients that go away, many at once, what is no HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

import httpx
import numpy as np
import uvicorn
from command import PROGRAM, process
from ports import free_port
from serving import HELLO, chunks, fresh_answer, joined, open_llm, server_at, serving

from edge_steer.runtime.answer import Sampling, stream_pieces
from edge_steer.serve import run, worker
from edge_steer.serve.app import Loading

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"messages": HELLO, "temperature": 0, "repeat_penalty": 1.0, "max_tokens": 400}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server_at(model, tmp_path_factory.mktemp("server")) as address:
        yield address


def load(server: str) -> int:
    return int(httpx.get(f"{server}/health").json()["load"])


def wait_until_idle(server: str, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while load(server):
        assert time.monotonic() < end, "the server still works for a client that has gone"
        time.sleep(0.02)


def pieces_of_answer(model: Path, at: int | None = None, dial: float = 0) -> list[str]:
    """What each token adds to an answer of SteeredLlama, whose dial is moved behind its token `at`."""
    llm = open_llm(model)
    llm.angles.update(happy=-40, formal=None)
    sampling = Sampling(max_tokens=LONG["max_tokens"], repeat_penalty=1.0)
    found = []
    for piece in stream_pieces(llm, llm.chat_tokens(HELLO), sampling, strip=True):
        found.append(piece.text)
        if len(found) == at:
            llm.angles["happy"] = dial
    return found


def test_a_dial_that_moves_while_it_talks_turns_the_next_tokens(model: Path, server: str) -> None:
    moved, text, before = None, "", ""
    asked = {**LONG, "stream": True, "steering": "happy:-40"}
    with httpx.Client(base_url=server) as client, client.stream("POST", CHAT, json=asked) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                body = json.loads(line[6:])
                text += body["choices"][0]["delta"].get("content", "")
                if body["steering"]["happy"] == -40:
                    before = text
                if moved is None and text:
                    moved = client.post(f"/v1/steering/{body['id']}", json={"steering": {"happy": 40}})
    assert moved is not None
    assert moved.json()["steering"] == {"happy": 40, "formal": None}
    steady = pieces_of_answer(model)
    ends = np.cumsum([len(piece) for piece in steady])
    told = [at for at, end in enumerate(ends, 1) if end == len(before)]  # several where a token adds no text
    assert text != "".join(steady)
    assert text in ["".join(pieces_of_answer(model, at, 40)) for at in told]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_answer(server: str, stream: bool) -> None:
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server + CHAT, json={**LONG, "stream": stream, "n": 16}, timeout=httpx.Timeout(5, read=0.001))
    begin = time.monotonic()
    wait_until_idle(server)
    assert httpx.post(server + CHAT, json={**LONG, "max_tokens": 4}).status_code == 200
    assert time.monotonic() - begin < 5


def test_half_a_request_and_noise_do_no_harm(server: str) -> None:
    host, port = server.removeprefix("http://").split(":")
    half = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    half += b"Content-Length: 50\r\n\r\n{"
    for noise in (b"", b"\x00" * 100, b"GET / HTTP/1.1\r\nHost:", half, b"A" * 100_000):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(noise)
    wait_until_idle(server)
    assert httpx.post(server + CHAT, json={**LONG, "max_tokens": 4}).status_code == 200


@pytest.mark.parametrize("told", [True, False], ids=["Content-Length", "chunked"])
def test_who_sends_too_large_a_body_reads_why_it_is_refused(server: str, told: bool) -> None:
    def hundred_megabytes() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 20)

    headers = {"Content-Type": "application/json", **({"Content-Length": str(100 << 20)} if told else {})}
    answer = httpx.post(server + CHAT, content=hundred_megabytes(), headers=headers)
    assert (answer.status_code, answer.headers["Connection"]) == (413, "close")
    assert "at most" in answer.json()["error"]["message"]
    assert httpx.post(server + CHAT, json={**LONG, "max_tokens": 4}).status_code == 200


def test_past_a_full_queue_a_request_is_told_to_come_again(model: Path, tmp_path: Path) -> None:
    async def flood(address: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            return await asyncio.gather(*(client.post(CHAT, json=LONG) for _ in range(8)))

    with server_at(model, tmp_path, "--queue", "2") as address:
        found = asyncio.run(flood(address))
        assert {each.status_code for each in found} == {200, 503}
        refused = next(each for each in found if each.status_code == 503)
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "queue_full"
        assert httpx.post(address + CHAT, json=LONG).status_code == 200


def test_many_clients_at_once_get_each_the_answer_of_a_fresh_model(model: Path, server: str) -> None:
    random_ = random.Random(0)
    cases = [
        {"messages": [{"role": "user", "content": random_.choice(("hello", "hello there", "other")) + "!" * (i % 3)}],
         "steering": {"happy": random_.choice((None, -40, 7.5, 40)), "formal": random_.choice((None, 30))},
         "seed": i, "temperature": random_.choice((0, 1.3)), "max_tokens": 12, "repeat_penalty": 1.0, "top_p": 1.0,
         "min_p": 0.0, "top_k": 0}
        for i in range(24)
    ]  # fmt: skip
    expected = [fresh_answer(model, case) for case in cases]
    asked = [random_.randrange(len(cases)) for _ in range(200)]

    async def one(client: httpx.AsyncClient, turn: asyncio.Semaphore, number: int) -> str:
        async with turn:
            stream = number % 2 == 0
            found = await client.post(CHAT, json={**cases[number], "stream": stream})
            assert found.status_code == 200, found.text
            return joined(chunks(found.text)) if stream else found.json()["choices"][0]["message"]["content"]

    async def all_of_them() -> list[str]:
        turn = asyncio.Semaphore(32)
        async with httpx.AsyncClient(base_url=server, timeout=120) as client:
            return await asyncio.gather(*(one(client, turn, number) for number in asked))

    assert asyncio.run(all_of_them()) == [expected[number] for number in asked]


def test_ctrl_c_ends_it_without_a_word(model: Path, tmp_path: Path) -> None:
    command = [*PROGRAM, "serve", "-m", str(model), "--port", str(free_port())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert "serving at http://127.0.0.1:" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        assert running.wait(20) in (0, 130)
        assert "Traceback" not in running.stderr.read()


def test_what_cannot_be_served_is_one_line(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = process("serve", "-m", model, "--port", port)
    assert (found.returncode, found.stderr.count(b"\n")) == (1, 1)
    assert b"cannot listen" in found.stderr
    missing = process("serve", "-m", "nothing.gguf", "--port", str(free_port()))
    assert (missing.returncode, missing.stderr.count(b"\n")) == (1, 1)


def test_words_of_a_fast_model_travel_together_and_none_is_lost() -> None:
    async def counts() -> list[int]:
        ticket = worker.Ticket("id", {}, {}, lambda *_: None)
        found = []
        for event, may_wait in (("first", True), ("second", True), ("third", True), ("end", False)):
            ticket.tell(event, may_wait=may_wait)
            await asyncio.sleep(0)
            found.append(ticket._events.qsize())
        assert [ticket._events.get_nowait() for _ in range(4)] == ["first", "second", "third", "end"]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "WAKE_SECONDS", 3600)
        assert asyncio.run(counts()) == [1, 1, 1, 4]


def test_a_wait_that_is_too_long_is_told(model: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, serving(model, patience=0.05) as client:
        patch.setattr(worker, "PING_SECONDS", 0.05)
        service = client.service  # type: ignore[attr-defined]
        release = threading.Event()

        async def occupy() -> None:
            service.worker.submit("test", {}, {}, lambda *_: release.wait(10))

        client.portal.call(occupy)  # type: ignore[union-attr]
        found = client.post(CHAT, json={**LONG, "max_tokens": 2})
        release.set()
        assert (found.status_code, found.json()["error"]["code"]) == (503, "queue_full")


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: local", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET"])
def test_a_connection_that_never_finishes_asking_is_closed(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.3)
    with run.bind("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(Loading(), http=run.Protocol, lifespan="off", log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            with socket.create_connection(listening.getsockname()) as connection:
                connection.settimeout(10)
                connection.sendall(sent)
                while connection.recv(4096):
                    pass  # closed: no more comes
        finally:
            server.should_exit = True
            thread.join()
