"""GGUF files byte by byte, so that tests can write what no library would."""

from __future__ import annotations

import struct

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(item: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + values


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def head(*entries: bytes, tensors: tuple[bytes, ...] = (), data: bytes = b"", version: int = 3, **counts: int) -> bytes:
    keys, infos = counts.get("keys", len(entries)), counts.get("infos", len(tensors))
    raw = struct.pack("<4sIQQ", b"GGUF", version, infos, keys) + b"".join(entries) + b"".join(tensors)
    return raw + (b"\0" * (-len(raw) % 32) + data if data else b"")
