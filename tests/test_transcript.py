"""A conversation goes on where it was: from what /save wrote, and after a lost RPC server."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from command import ONE_THREAD, process, steering_for

pytest.importorskip("torch")
pytest.importorskip("transformers")


from edge_steer.errors import FormatError, SteerError
from edge_steer.runtime import rpc
from edge_steer.runtime.answer import Sampling
from edge_steer.runtime.chat import Chat
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.transcript import read_transcript, save_beside

TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi é"}]


def test_a_resumed_chat_goes_on_as_one_that_never_ended(model: Path, tmp_path: Path) -> None:
    happy, saved, again, whole = (tmp_path / name for name in ("happy.gguf", "a.json", "b.json", "c.json"))
    steering_for(model, name="happy").with_(angle=5.0).save(happy)
    common = ("-m", model, "--max-tokens", 8, "--ctx", 256, *ONE_THREAD)

    def chat(*options: object, lines: list[str]) -> None:
        found = process("chat", *common, *options, input="\n".join([*lines, ""]).encode())
        assert found.returncode == 0, found.stderr

    steer = ("-s", happy)
    chat("-s", f"{happy}:20", lines=["Hello", "/angle -30", "Who?", f"/save {whole}"])
    chat("-s", f"{happy}:20", lines=["Hello", "/angle -30", f"/save {saved}"])
    chat(*steer, "--resume", saved, lines=["Who?", f"/save {again}"])
    assert json.loads(again.read_text("utf-8")) == json.loads(whole.read_text("utf-8"))
    other = tmp_path / "d.json"
    chat("-s", f"{happy}:5", "--system", "Be kind.", "--resume", saved, lines=[f"/save {other}"])
    record = json.loads(other.read_text("utf-8"))
    assert record["angles"] == {"happy": 5}
    assert record["gates"] == {"happy": None}
    assert record["messages"][0] == {"role": "system", "content": "Be kind."}


def test_a_conversation_goes_on_under_its_gates(model: Path, tmp_path: Path) -> None:
    happy, saved, again = (tmp_path / name for name in ("happy.gguf", "a.json", "b.json"))
    steering_for(model, name="happy").with_(angle=5.0).save(happy)
    common = ("-m", model, "--max-tokens", 8, "--ctx", 256, *ONE_THREAD)
    for options, file in (
        (("-s", f"{happy}:20@first:3"), saved),
        (("-s", happy, "--resume", saved), again),
        (("-s", f"{happy}@after:2", "--resume", saved), tmp_path / "c.json"),
    ):
        found = process("chat", *common, *options, input=f"Hello\n/save {file}\n".encode())
        assert found.returncode == 0, found.stderr
    gates = [json.loads((tmp_path / f"{name}.json").read_text("utf-8"))["gates"]["happy"] for name in "abc"]
    assert gates == ["@first:3", "@first:3", "@after:2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "JSON"),
        ("[]", "object"),
        ("{}", "expected messages"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "expected messages"),
        ('{"messages": [{"role": "user", "content": 3}]}', "expected messages"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "in turn"),
        ('{"messages": [], "angles": {"happy": "8"}}', "angles by name"),
        ('{"messages": [], "gates": {"happy": 8}}', "gates by name"),
        ('{"messages": [], "gates": {"happy": "@never"}}', "@never"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(text)
    with pytest.raises(FormatError, match=said):
        read_transcript(file)
    with pytest.raises(SteerError, match="no such file"):
        read_transcript(tmp_path / "none.json")


def test_a_conversation_that_ends_by_force_is_kept_beside(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chat = Chat(SteeredLlama(model, n_ctx=256, n_threads=1), Sampling())
    assert save_beside(chat) == ""
    chat.turns = list(TURNS)
    assert "--resume edge-steer-chat-" in save_beside(chat)
    (file,) = tmp_path.iterdir()
    assert list(read_transcript(file).messages) == TURNS


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="sockets are not files here: a lost server is not noticed")
def test_a_server_that_hung_up_is_noticed_and_one_that_is_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_told_lost", False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with socket.create_connection(listener.getsockname()):
            server, _ = listener.accept()
            rpc.check_servers([address, "127.0.0.1:1"])
            server.sendall(b"x")
            files = set(os.listdir("/dev/fd"))
            rpc.check_servers([address])
            assert set(os.listdir("/dev/fd")) == files
        with socket.create_connection(listener.getsockname()):
            other, _ = listener.accept()
            other.close()
            with pytest.raises(SteerError, match=f"RPC server {address} was lost"):
                rpc.check_servers([address])
        server.close()
