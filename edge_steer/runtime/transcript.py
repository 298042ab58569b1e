"""A conversation as a JSON file: what /save writes, and what `chat --resume` goes on from."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.gate import Gate
from edge_steer.json_file import read_json
from edge_steer.runtime.chat import Chat
from edge_steer.runtime.hooked_llama import Message
from edge_steer.whole_file import whole_file

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Transcript:
    """messages: each with a role and its content, the system prompt first if there is one. angles: the dials. gates:
    when each steering acted; a steering that is not named keeps the gate that it has."""

    messages: tuple[Message, ...]
    angles: dict[str, float | None]
    gates: dict[str, Gate | None] = field(default_factory=dict)


def save_transcript(chat: Chat, path: Path) -> None:
    """Write the conversation. Raises SteerError if `path` exists or cannot be written."""
    if path.exists():
        raise SteerError(f"{path} exists; choose another name")
    record = {
        "model": Path(chat.llm.model_path).name,
        "angles": dict(chat.llm.angles),
        "gates": {name: None if gate is None else str(gate) for name, gate in chat.llm.gates.items()},
        "scope": chat.llm.scope,
        "messages": chat.messages(),
    }
    with whole_file(path) as part:
        part.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_transcript(path: Path) -> Transcript:
    """The conversation in a file. Raises SteerError if there is none, FormatError where it is no conversation."""
    if not path.is_file():
        raise SteerError(f"{path}: expected a conversation that /save wrote, got no such file; check the path")
    record = read_json(path)
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise FormatError(f"{path}: expected messages, each with a role and text as its content, got {quote(messages)}")
    roles = [each["role"] for each in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise FormatError(f"{path}: expected questions and answers in turn, got the roles {quote(roles)}")
    angles = record.get("angles", {})
    if not isinstance(angles, dict) or not all(_is_dial(each) for each in angles.values()):
        raise FormatError(f"{path}: expected angles by name, got {quote(angles)}")
    dials = {name: None if dial is None else float(dial) for name, dial in angles.items()}
    return Transcript(tuple(messages), dials, _gates(path, record.get("gates", {})))


def resume(chat: Chat, transcript: Transcript) -> None:
    """Put the conversation into `chat`; a system prompt that it has already stays."""
    turns = list(transcript.messages)
    if turns and turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
        chat.system = chat.system or system
    chat.turns = turns


def save_beside(chat: Chat) -> str:
    """Save the conversation under a name of its own in the folder one is in, or for temporary files where that cannot
    be; returns a line that says where, nothing where nothing was said."""
    if not chat.turns:
        return ""
    name = f"edge-steer-chat-{datetime.now():%Y%m%d-%H%M%S}.json"
    try:
        save_transcript(chat, path := Path(name))
    except SteerError:
        save_transcript(chat, path := Path(tempfile.gettempdir()) / name)
    return f"the conversation up to its last answer is kept; go on with: edge-steer chat --resume {path} …"


def _gates(path: Path, given: Any) -> dict[str, Gate | None]:
    if not isinstance(given, dict) or not all(each is None or isinstance(each, str) for each in given.values()):
        raise FormatError(f"{path}: expected gates by name, got {quote(given)}")
    try:
        return {name: Gate.parse(each) if each else None for name, each in given.items()}
    except SteerError as error:
        raise FormatError(f"{path}: {error}") from None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in _ROLES and isinstance(value.get("content"), str)


def _is_dial(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
