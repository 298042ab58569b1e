"""Reads the head of a GGUF file: metadata and tensor infos, never the tensors.

Knows GGUF versions 2 and 3, little-endian. The file may be hostile: every length is checked against the bytes that
are left before anything is read or allocated, arrays nobody wants are walked over without building an object per
element, and whatever is malformed raises FormatError with the place, what was expected and what was found.
Stricter than the format: one meaning per key (no duplicates), no arrays of arrays (llama.cpp refuses them too).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.gguf_cursor import MAX_KEY_BYTES, U32, U64, Cursor
from edge_steer.gguf_tensors import TensorInfo, check_extent, read_tensors

# What no honest file comes near. They keep the time that a hostile one can cost to seconds.
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17

_HEADER = struct.Struct("<4sIQQ")
_ITEM_HEADER = struct.Struct("<IQ")
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_DTYPES = {value_type: np.dtype(code) for value_type, code in _SCALARS.items()}
_KINDS = {int(value_type): value_type for value_type in GGUFValueType}


@dataclass(frozen=True)
class Value:
    """A typed value. Arrays: `item` is their element type, `value` a numpy array, or a list where it holds strings."""

    type: GGUFValueType
    value: Any
    item: GGUFValueType | None = None


@dataclass(frozen=True)
class Gguf:
    """The head of a file.

    tensors_start, data_start: bytes at which the tensors' descriptions and their data begin.
    sha256: of the array asked for, None where the file has no such array.
    """

    values: dict[str, Value]
    tensors: tuple[TensorInfo, ...]
    tensors_start: int
    data_start: int
    sha256: str | None


def read_gguf(path: Path, wanted: Callable[[str], bool], *, hashed: str = "") -> Gguf:
    """The metadata and tensor infos of the GGUF file `path`.

    Scalars are always kept, strings and arrays where `wanted(key)`. `hashed` names an array of strings whose bytes as
    they stand in the file (each string: uint64 length, then its bytes) are hashed, whether wanted or not.
    Raises FormatError if the file is malformed, SteerError where it cannot be read.
    """
    try:
        with open(_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _HEADER.size:
                raise FormatError(f"{path}: expected a GGUF file of at least {_HEADER.size} bytes, got {size}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(Cursor(path, data), wanted, hashed)
    except OSError as error:
        raise SteerError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from None


def _regular(path: Path) -> Path:
    # A pipe would block, a device has no size.
    if not stat.S_ISREG(os.stat(path).st_mode):
        kind = "a folder" if path.is_dir() else "something else"
        raise SteerError(f"expected a GGUF file at {path}, got {kind}; give the path of a file")
    return path


def _read(cursor: Cursor, wanted: Callable[[str], bool], hashed: str) -> Gguf:
    magic, version, tensor_count, key_count = cursor.unpack(_HEADER, "header")
    if magic != b"GGUF":
        raise cursor.error("magic", "b'GGUF'", f"{magic!r}; this is not a GGUF file", 0)
    if version not in (2, 3):
        hint = "; big-endian files are not read" if version & 0xFFFF == 0 and version else ""
        raise cursor.error("version", "2 or 3", f"{version}{hint}", 4)
    # The least that an entry can take: a key of 8 bytes length, a type and a byte; a tensor of no name and dimension.
    for what, count, least, most in (
        ("number of tensors", tensor_count, 24, _MAX_TENSORS),
        ("number of keys", key_count, 13, _MAX_KEYS),
    ):
        most = min(most, (cursor.size - cursor.at) // least)
        if count > most:
            raise cursor.error(what, f"at most {most} in the bytes that are left", count)

    values: dict[str, Value] = {}
    seen: set[str] = set()
    sha256 = None
    for _ in range(key_count):
        start = cursor.at
        key = cursor.string("key", MAX_KEY_BYTES)
        if key in seen:
            raise cursor.error("key", "every key once", f"{quote(key)} twice", start)
        seen.add(key)
        value, digest = _value(cursor, key, wanted(key), key == hashed)
        sha256 = sha256 or digest
        if value is not None:
            values[key] = value

    alignment = _alignment(cursor, values.get("general.alignment"))
    tensors_start = cursor.at
    tensors = read_tensors(cursor, tensor_count, alignment)
    data_start = -(-cursor.at // alignment) * alignment
    if not tensors and cursor.size > data_start:
        rest = cursor.size - cursor.at
        raise cursor.error("end of metadata", "the end of the file, which has no tensors", f"{rest} more bytes")
    for tensor in tensors:
        check_extent(cursor, tensor, data_start)
    return Gguf(values, tensors, tensors_start, data_start, sha256)


def _kind(cursor: Cursor, number: int, what: str) -> GGUFValueType:
    if number not in _KINDS:
        raise cursor.error(what, f"a value type below {len(_KINDS)}", number)
    return _KINDS[number]


def _value(cursor: Cursor, key: str, keep: bool, hash_it: bool) -> tuple[Value | None, str | None]:
    """The value at the cursor, None where it is passed over, and its hash where asked for."""
    what = f"value of {quote(key)}"
    kind = _kind(cursor, cursor.unpack(U32, what)[0], what)
    if hash_it and kind != GGUFValueType.ARRAY:
        raise cursor.error(what, "an array of strings", kind.name)
    if kind == GGUFValueType.STRING:
        if keep:
            return Value(kind, cursor.string(what)), None
        cursor.take(cursor.unpack(U64, what)[0], what)
        return None, None
    if kind == GGUFValueType.ARRAY:
        return _array(cursor, what, keep, hash_it)
    return Value(kind, _numbers(cursor, kind, 1, what)[0].item()), None


def _array(cursor: Cursor, what: str, keep: bool, hash_it: bool) -> tuple[Value | None, str | None]:
    number, count = cursor.unpack(_ITEM_HEADER, what)
    item = _kind(cursor, number, what)
    if item == GGUFValueType.ARRAY:
        raise cursor.error(what, "an array of scalars or strings", "an array of arrays")
    if hash_it and item != GGUFValueType.STRING:
        raise cursor.error(what, "an array of strings", f"an array of {item.name}")
    if item != GGUFValueType.STRING:
        if keep:
            return Value(GGUFValueType.ARRAY, _numbers(cursor, item, count, what), item), None
        cursor.take(count * _DTYPES[item].itemsize, what)
        return None, None
    most = min(cursor.strings_left, (cursor.end - cursor.at) // U64.size)
    if count > most:
        raise cursor.error(what, f"at most {most} strings in the bytes that are left", count)
    start = cursor.at
    strings = cursor.strings(count, what, keep)
    cursor.strings_left -= count
    digest = _sha256(cursor.data, start, cursor.at) if hash_it else None
    return (Value(GGUFValueType.ARRAY, strings, item) if keep else None), digest


def _numbers(cursor: Cursor, kind: GGUFValueType, count: int, what: str) -> np.ndarray[Any, Any]:
    dtype = _DTYPES[kind]
    start = cursor.take(count * dtype.itemsize, what)
    numbers = np.frombuffer(cursor.data[start : cursor.at], dtype)
    if kind != GGUFValueType.BOOL:
        return numbers
    if count and numbers.max() > 1:
        raise cursor.error(what, "booleans of 0 or 1", numbers.max(), start)
    return numbers.astype(np.bool_)


def _sha256(data: mmap.mmap, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    for at in range(start, stop, 1 << 20):
        digest.update(data[at : min(at + (1 << 20), stop)])
    return digest.hexdigest()


def _alignment(cursor: Cursor, value: Value | None) -> int:
    if value is None:
        return 32
    alignment = value.value
    if value.type != GGUFValueType.UINT32 or alignment <= 0 or alignment & (alignment - 1):
        got = f"{quote(alignment)} ({value.type.name})"
        raise cursor.error("value of 'general.alignment'", "a power of two (UINT32)", got)
    return int(alignment)
