"""A GGUF file read from front to back: every length is checked against the bytes that are left before it is used."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from edge_steer.errors import FormatError

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
# What no honest file comes near. They keep the time that a hostile one can cost to seconds.
_MAX_HEAD = 512 << 20
_MAX_STRINGS = 1 << 23  # in all arrays together; large vocabularies have well under a million with their merges
MAX_KEY_BYTES = 65535


class Cursor:
    """A place in the file that only moves forward, and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.end = min(self.size, _MAX_HEAD)
        self.at = 0
        self.strings_left = _MAX_STRINGS

    def error(self, what: str, expected: str, got: object, at: int | None = None) -> FormatError:
        place = self.at if at is None else at
        return FormatError(f"{self.path}: {what} at byte {place}: expected {expected}, got {got}")

    def take(self, length: int, what: str) -> int:
        """Move past `length` bytes; returns where they begin."""
        if length > self.end - self.at:
            raise self.error(what, f"{length} bytes", f"{self.end - self.at} that are left")
        start = self.at
        self.at += length
        return start

    def unpack(self, form: struct.Struct, what: str) -> tuple[Any, ...]:
        return form.unpack_from(self.data, self.take(form.size, what))

    def string(self, what: str, limit: int = _MAX_HEAD) -> str:
        start = self.at
        (length,) = self.unpack(U64, what)
        if length > limit:
            raise self.error(what, f"at most {limit} bytes", length, start)
        first = self.take(length, what)
        return self.decode(first, self.at, what)

    def decode(self, start: int, stop: int, what: str) -> str:
        try:
            return self.data[start:stop].decode()
        except UnicodeDecodeError as error:
            raise self.error(what, "UTF-8", f"bytes that are not ({error.reason})", start + error.start) from None

    def strings(self, count: int, what: str, keep: bool) -> list[str]:
        """Move past `count` strings; returns them where they are to be kept."""
        kept: list[str] = []
        data, unpack, last = self.data, U64.unpack_from, self.end - U64.size
        at = self.at
        for _ in range(count):
            if at > last:
                break
            start = at + 8
            at = start + unpack(data, at)[0]
            if keep and at <= self.end:
                kept.append(self.decode(start, at, what))
        else:
            if at <= self.end:
                self.at = at
                return kept
        raise self.error(what, f"{count} strings", f"more than the {self.end - self.at} bytes that are left")
