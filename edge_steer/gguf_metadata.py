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
from gguf.constants import GGML_QUANT_SIZES, GGUFValueType

from edge_steer.errors import FormatError, SteerError, shown

# What no honest file comes near. They keep the time that a hostile one can cost to seconds.
_MAX_HEAD = 512 << 20
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_STRINGS = 1 << 23  # in all arrays together; large vocabularies have well under a million with their merges
_MAX_KEY_BYTES = 65535
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 1 << 63

_HEADER = struct.Struct("<4sIQQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
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
class TensorInfo:
    """One tensor: `shape` in GGUF order (fastest axis first), `type` as in ggml, `offset` in bytes from data start."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Gguf:
    """The head of a file. `sha256` is that of the array asked for, None where the file has no such array."""

    values: dict[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_start: int
    sha256: str | None


def read_gguf(path: Path, wanted: Callable[[str], bool], *, hashed: str = "") -> Gguf:
    """The metadata and tensor infos of the GGUF file `path`.

    Scalars are always kept, strings and arrays where `wanted(key)`. `hashed` names an array of strings whose bytes as
    they stand in the file (each string: uint64 length, then its bytes) are hashed, whether wanted or not.
    Raises FormatError where the file is malformed, SteerError where it cannot be read.
    """
    try:
        with open(_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _HEADER.size:
                raise FormatError(f"{path}: expected a GGUF file of at least {_HEADER.size} bytes, got {size}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Cursor(path, data), wanted, hashed)
    except OSError as error:
        raise SteerError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from None


def _regular(path: Path) -> Path:
    # A pipe would block, a device has no size.
    if not stat.S_ISREG(os.stat(path).st_mode):
        kind = "a folder" if path.is_dir() else "something else"
        raise SteerError(f"expected a GGUF file at {path}, got {kind}; give the path of a file")
    return path


class _Cursor:
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
        (length,) = self.unpack(_U64, what)
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
        data, unpack, last = self.data, _U64.unpack_from, self.end - _U64.size
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


def _read(cursor: _Cursor, wanted: Callable[[str], bool], hashed: str) -> Gguf:
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
        key = cursor.string("key", _MAX_KEY_BYTES)
        if key in seen:
            raise cursor.error("key", "every key once", f"{shown(key)} twice", start)
        seen.add(key)
        value, digest = _value(cursor, key, wanted(key), key == hashed)
        sha256 = sha256 or digest
        if value is not None:
            values[key] = value

    alignment = _alignment(cursor, values.get("general.alignment"))
    tensors = _tensors(cursor, tensor_count, alignment)
    data_start = -(-cursor.at // alignment) * alignment
    if not tensors and cursor.size > data_start:
        rest = cursor.size - cursor.at
        raise cursor.error("end of metadata", "the end of the file, which has no tensors", f"{rest} more bytes")
    for tensor in tensors:
        _check_extent(cursor, tensor, data_start)
    return Gguf(values, tensors, data_start, sha256)


def _kind(cursor: _Cursor, number: int, what: str) -> GGUFValueType:
    if number not in _KINDS:
        raise cursor.error(what, f"a value type below {len(_KINDS)}", number)
    return _KINDS[number]


def _value(cursor: _Cursor, key: str, keep: bool, hash_it: bool) -> tuple[Value | None, str | None]:
    """The value at the cursor, None where it is passed over, and its hash where asked for."""
    what = f"value of {shown(key)}"
    kind = _kind(cursor, cursor.unpack(_U32, what)[0], what)
    if hash_it and kind != GGUFValueType.ARRAY:
        raise cursor.error(what, "an array of strings", kind.name)
    if kind == GGUFValueType.STRING:
        if keep:
            return Value(kind, cursor.string(what)), None
        cursor.take(cursor.unpack(_U64, what)[0], what)
        return None, None
    if kind == GGUFValueType.ARRAY:
        return _array(cursor, what, keep, hash_it)
    return Value(kind, _numbers(cursor, kind, 1, what)[0].item()), None


def _array(cursor: _Cursor, what: str, keep: bool, hash_it: bool) -> tuple[Value | None, str | None]:
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
    most = min(cursor.strings_left, (cursor.end - cursor.at) // _U64.size)
    if count > most:
        raise cursor.error(what, f"at most {most} strings in the bytes that are left", count)
    start = cursor.at
    strings = cursor.strings(count, what, keep)
    cursor.strings_left -= count
    digest = _sha256(cursor.data, start, cursor.at) if hash_it else None
    return (Value(GGUFValueType.ARRAY, strings, item) if keep else None), digest


def _numbers(cursor: _Cursor, kind: GGUFValueType, count: int, what: str) -> np.ndarray[Any, Any]:
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


def _alignment(cursor: _Cursor, value: Value | None) -> int:
    if value is None:
        return 32
    alignment = value.value
    if value.type != GGUFValueType.UINT32 or alignment <= 0 or alignment & (alignment - 1):
        got = f"{shown(alignment)} ({value.type.name})"
        raise cursor.error("value of 'general.alignment'", "a power of two (UINT32)", got)
    return int(alignment)


def _tensors(cursor: _Cursor, count: int, alignment: int) -> tuple[TensorInfo, ...]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        start = cursor.at
        name = cursor.string("tensor name", _MAX_KEY_BYTES)
        what = f"tensor {shown(name)}"
        (dimensions,) = cursor.unpack(_U32, what)
        if dimensions > _MAX_DIMENSIONS:
            raise cursor.error(what, f"at most {_MAX_DIMENSIONS} dimensions", dimensions)
        *shape, kind, offset = cursor.unpack(struct.Struct(f"<{dimensions}QIQ"), what)
        elements = 1
        for length in shape:
            elements *= length
        if elements >= _MAX_ELEMENTS or any(length >= _MAX_ELEMENTS for length in shape):
            raise cursor.error(what, "fewer than 2^63 elements", f"shape {tuple(shape)}", start)
        if offset % alignment:
            raise cursor.error(what, f"an offset that is a multiple of {alignment}", offset, start)
        if name in tensors:
            raise cursor.error(what, "every tensor once", "it twice", start)
        tensors[name] = TensorInfo(name, tuple(shape), kind, offset)
    return tuple(tensors.values())


def tensor_bytes(tensor: TensorInfo) -> int | None:
    """Bytes that the data of `tensor` take; None for a type that this release does not know."""
    sizes = _QUANT_SIZES.get(tensor.type)
    if sizes is None:
        return None
    block, block_bytes = sizes
    rows = 1
    for length in tensor.shape[1:]:
        rows *= length
    width = tensor.shape[0] if tensor.shape else 1
    return -(-width // block) * block_bytes * rows


_QUANT_SIZES: dict[int, tuple[int, int]] = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _check_extent(cursor: _Cursor, tensor: TensorInfo, data_start: int) -> None:
    end = data_start + tensor.offset + (tensor_bytes(tensor) or 0)
    if end > cursor.size:
        raise FormatError(
            f"{cursor.path}: expected tensor {shown(tensor.name)} to end by byte {cursor.size}, the end of the file, "
            f"got byte {end}; the file is cut short: fetch it again"
        )
