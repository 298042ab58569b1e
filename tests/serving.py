"""A server on a tiny model: in this process, or as one of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from command import ONE_THREAD, PROGRAM, steering_for
from starlette.testclient import TestClient

from edge_steer.runtime.answer import Sampling
from edge_steer.runtime.chat import generate_answer
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.serve.app import make_app
from edge_steer.serve.guard import Rules
from edge_steer.serve.service import Service
from edge_steer.serve.worker import Worker
from edge_steer.steering import Steering, save_all

SMALL: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
GREEDY = Sampling(max_tokens=16, repeat_penalty=1.0)
ASKED: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1.0, "max_tokens": 16}
HELLO = [{"role": "user", "content": "hello there"}]


def two_steerings(model: Path) -> list[Steering]:
    """`happy` with a range and a default, `formal` with neither."""
    happy = steering_for(model, seed=0, name="happy").with_(angle=20, angle_min=-40, angle_max=40)
    return [happy, steering_for(model, seed=1, name="formal")]


def open_llm(model: Path) -> SteeredLlama:
    return SteeredLlama(model, steering=two_steerings(model), angles={"happy": 20, "formal": None}, **SMALL)


@contextmanager
def serving(model: Path, rules: Rules | None = None, waiting: int = 64, **service: Any) -> Iterator[TestClient]:
    """A client of a server in this process; `client.service` is what it serves."""
    llm = open_llm(model)
    served = Service(llm, Worker(llm, waiting), "tiny", GREEDY, **service)
    headers = {"Authorization": f"Bearer {rules.key}"} if rules and rules.key else {}
    try:
        with TestClient(make_app(served, rules or Rules()), base_url="http://localhost", headers=headers) as client:
            client.service = served  # type: ignore[attr-defined]
            yield client
    finally:
        served.worker.close()
        llm.close()


@contextmanager
def server_at(model: Path, folder: Path, *options: str, max_tokens: int = 400) -> Iterator[str]:
    """As server_process, its address alone."""
    with server_process(model, folder, *options, max_tokens=max_tokens) as (address, _):
        yield address


@contextmanager
def server_process(
    model: Path, folder: Path, *options: str, max_tokens: int = 400
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of `edge-steer serve` as a process, once it is ready, and the process."""
    file = folder / "two.gguf"
    save_all(two_steerings(model), file, force=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *PROGRAM, "serve", "-m", str(model), "-s", f"{file}", "--port", str(port), *ONE_THREAD, "--temp", "0",
        "--max-tokens", str(max_tokens), *options,
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(address, process)
            yield address, process
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(address: str, process: subprocess.Popen[str]) -> None:
    for _ in range(300):
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("the server was not ready in 30 seconds")


def fresh_answer(model: Path, case: dict[str, Any]) -> str:
    """What SteeredLlama itself answers to a request, fresh."""
    llm = open_llm(model)
    llm.angles.update(case["steering"])
    names = ("temperature", "seed", "max_tokens", "repeat_penalty", "top_p", "min_p", "top_k")
    text = generate_answer(llm, case["messages"], Sampling(**{name: case[name] for name in names})).text
    llm.close()
    return text


def chunks(text: str) -> list[Any]:
    """The data of server-sent events; comments are left out."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def joined(found: list[Any], index: int = 0) -> str:
    """The text of a streamed chat answer."""
    deltas = [each["choices"][0] for each in found if each != "[DONE]" and each.get("choices")]
    return "".join(each["delta"].get("content") or "" for each in deltas if each["index"] == index)
