"""Layers on other machines: llama.cpp's RPC servers, here in processes of their own on the loopback address.

Needs a llama-cpp-python that is built with CMAKE_ARGS=-DGGML_RPC=ON; docs/devices.md says how.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("transformers")

from devices import EXACT, TOLERANCE, logits_by_batch, open_forced, steerings_for
from planted import DIAL
from ports import free_port

from edge_steer import MismatchError, SteeredLlama, SteerError
from edge_steer.choices import OPERATORS, Operator
from edge_steer.cli.main import main
from edge_steer.model_file import read_model
from edge_steer.runtime import rpc
from edge_steer.runtime.hook import Record
from edge_steer.runtime.transcript import read_transcript

needs_rpc = pytest.mark.skipif(
    not llama_cpp.llama_supports_rpc(),
    reason="llama-cpp-python is built without RPC: devices other than the CPU are NOT tested; see docs/devices.md",
)


@contextmanager
def serving() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """An RPC server in a process of its own: its address and the process."""
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen([sys.executable, "-m", "edge_steer.runtime.rpc", address, "1"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        for _ in range(600):
            try:
                rpc._greet(address)
                break
            except SteerError:
                assert process.poll() is None
                time.sleep(0.1)
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop it
        yield address, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def servers() -> Iterator[list[str]]:
    with serving() as (one, _), serving() as (other, _):
        yield [one, other]


def on(servers: list[str], count: int) -> dict[str, object]:
    """Every layer on the first `count` servers, evenly."""
    return {"rpc": servers[:count], "tensor_split": [1.0] * count, "n_gpu_layers": -1}


@needs_rpc
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_host_the_device_and_the_copying_path_give_the_same_logits(
    servers: list[str], model: Path, operator: Operator, count: int, devices: int
) -> None:
    steerings = steerings_for(model, operator, count)
    host = open_forced(model, "host", steerings)
    others = [open_forced(model, way, steerings, **on(servers, devices)) for way in ("device", "copy", "auto")]
    for expected, *found in zip(*map(logits_by_batch, (host, *others)), strict=True):
        for each in found:
            assert np.abs(each - expected).max() <= TOLERANCE * np.ptp(expected)
    assert all((each._hook.turned == host._hook.turned).all() for each in others)


@needs_rpc
def test_the_host_path_cannot_reach_a_device(servers: list[str], model: Path) -> None:
    """So the tests above are about memory that is not the host's."""
    llm = open_forced(model, "host", steerings_for(model, "selective", 1), **on(servers, 1))
    with pytest.raises(SteerError, match="memory it cannot reach"):
        llm.eval([256, 40])


@needs_rpc
@pytest.mark.parametrize("devices", [1, 2])
def test_the_lora_engine_works_on_servers(servers: list[str], model: Path, devices: int) -> None:
    (steering,) = steerings_for(model, "selective", 1)
    host = open_forced(model, "host", [steering])
    dials = {steering.name: DIAL["selective"]}
    lora = SteeredLlama(model, steering=steering, angles=dials, n_ctx=768, **EXACT, **on(servers, devices))
    assert lora.engine == "lora"
    for expected, found in zip(logits_by_batch(host), logits_by_batch(lora), strict=True):
        assert np.abs(found - expected).max() <= 1e-3 * np.ptp(expected)


@needs_rpc
def test_recording_on_servers_gives_the_host_s_sums(servers: list[str], model: Path) -> None:
    records = []
    for where in ({}, on(servers, 2)):
        llm = SteeredLlama(model, steering=(), n_ctx=768, **EXACT, **where)
        record = Record.zeros(len(llm.hook_sites), read_model(model).embedding_length)
        for prompt in ([256, 40], [256, *(30 + i % 200 for i in range(600))]):
            llm.observe(prompt, record)
        records.append(record)
    assert (records[0].count == records[1].count).all()
    assert np.abs(records[0].sum - records[1].sum).max() <= TOLERANCE * np.abs(records[0].sum).max()


@needs_rpc
def test_generate_answers_the_same_over_servers(servers: list[str], model: Path) -> None:
    arguments = ["generate", "-m", str(model), "-p", "Hello", "--max-tokens", "12", "--ctx", "256", "--threads", "1"]
    over = [part for server in servers for part in ("--rpc", server)]
    answers = [CliRunner().invoke(main, [*arguments, *extra]) for extra in ([], over)]
    assert [each.exit_code for each in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout
    assert answers[0].stdout.strip()


@contextmanager
def chatting(
    model: Path, folder: Path, max_tokens: int
) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """A chat over a server that has begun its first answer, and the server; the chat runs in `folder`."""
    with serving() as (address, server):
        command = [sys.executable, "-m", "edge_steer", "chat", "-m", str(model), "--rpc", address]
        chat = subprocess.Popen(
            [*command, "--max-tokens", str(max_tokens), "--ctx", "256", "--threads", "1"], cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write(b"Hello\n")
        chat.stdin.flush()
        assert chat.stdout.read(1)
        yield chat, server


def errors_of(said: bytes) -> list[str]:
    assert "Traceback" not in said.decode()
    assert ".cpp" not in said.decode()
    return [line for line in said.decode().splitlines() if "Error" in line]


@needs_rpc
def test_a_server_lost_between_answers_costs_no_conversation(model: Path, tmp_path: Path) -> None:
    with chatting(model, tmp_path, 4) as (chat, server):
        assert chat.stdout is not None
        while chat.stdout.read(1) != b"\n":
            pass
        server.send_signal(signal.SIGKILL)
        server.wait()
        _, said = chat.communicate(b"Hello\n/save kept.json\n", timeout=120)
    (error,) = errors_of(said)
    assert error.startswith("Error: RPC server 127.0.0.1:")
    assert "was lost" in error
    assert chat.returncode == 1
    assert [each["role"] for each in read_transcript(tmp_path / "kept.json").messages] == ["user", "assistant"]


@needs_rpc
def test_a_server_lost_in_the_middle_of_an_answer_ends_the_chat_with_its_conversation_kept(
    model: Path, tmp_path: Path
) -> None:
    with chatting(model, tmp_path, 4) as (chat, server):
        assert chat.stdin is not None
        assert chat.stdout is not None
        while chat.stdout.read(1) != b"\n":
            pass
        chat.stdin.write(b"/angle\n" + b"Hello\n" * 2000)  # one answer after another, until it is lost
        chat.stdin.flush()
        assert chat.stdout.read(40)
        server.send_signal(signal.SIGKILL)
        server.wait()
        _, said = chat.communicate(timeout=120)
    assert chat.returncode == 1
    errors = errors_of(said)
    assert "lost" in errors[-1]


@pytest.mark.skipif(llama_cpp.llama_supports_rpc(), reason="this build has RPC")
def test_a_build_without_rpc_says_how_to_get_one(model: Path) -> None:
    result = CliRunner().invoke(main, ["generate", "-m", str(model), "-p", "Hello", "--rpc", "127.0.0.1:50052"])
    assert result.exit_code == 1
    assert "CMAKE_ARGS=-DGGML_RPC=ON pip install" in result.stderr


@needs_rpc
def test_a_server_that_cannot_be_reached_is_one_line(model: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    result = CliRunner().invoke(main, ["generate", "-m", str(model), "-p", "Hello", "--rpc", address])
    assert result.exit_code == 1
    assert result.stderr == f"Error: RPC server {address} cannot be reached: Connection refused; is it running?\n"


@pytest.mark.parametrize("server", ["", "host", "host:", ":50052", "host:x", "host:0", "host:70000", "::1:50052"])
def test_what_is_no_address_is_refused(server: str) -> None:
    with pytest.raises(SteerError, match="HOST:PORT"):
        rpc.parse_endpoint(server)


@contextmanager
def answering(reply: bytes | None) -> Iterator[str]:
    """A program that takes one connection and answers with `reply`; None: not at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(64)
                if reply is None:
                    done.wait(10)
                else:
                    connection.sendall(reply)

        done = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        done.set()
        thread.join()


def test_another_program_at_the_address_is_told_apart() -> None:
    with answering(b"HTTP/1.1 400 Bad Request\r\n") as address, pytest.raises(SteerError, match="another program"):
        rpc._greet(address)


def test_a_server_of_another_protocol_is_refused() -> None:
    reply = (28).to_bytes(8, "little") + bytes([9, 0, 0, 0]) + bytes(24)
    with answering(reply) as address, pytest.raises(MismatchError, match=r"protocol 7 .* got 9"):
        rpc._greet(address)


def test_of_another_release_s_protocol_ggml_itself_decides(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama_cpp, "__version__", "0.3.99")
    reply = (28).to_bytes(8, "little") + bytes([9, 0, 0, 0]) + bytes(24)
    with answering(reply) as address:
        rpc._greet(address)
    monkeypatch.setattr(rpc.os, "_exit", lambda code: None)
    rpc._end(b"ggml-rpc.cpp:550: RPC handshake failed for 127.0.0.1:50052")
    said = "Error: an RPC server is of another llama.cpp; run that of llama-cpp-python 0.3.99 there"
    assert capfd.readouterr().err.strip() == said


def test_a_server_that_is_busy_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_SECONDS", 0.2)
    with answering(None) as address, pytest.raises(SteerError, match="does not answer"):
        rpc._greet(address)
