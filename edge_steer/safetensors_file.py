"""safetensors files: where each tensor lies, its values as float32 some rows at a time, and files written anew.

The safetensors library is an extra, and its numpy knows no bfloat16, so headers are read here, and as strictly as
there: the tensors fill the file to its last byte, without a gap and without an overlap. bfloat16 is kept as its 16
bits in uint16, which no checkpoint holds otherwise. The weights are mapped, never read at once.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import FormatError, SteerError, quote

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000  # safetensors' own limit
_MOST_AXES = 8  # their product is a number of any length
_BLOCK = 1 << 22  # values in a block of rows
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its name, type (as in safetensors), shape, and where its bytes begin and end."""

    name: str
    path: Path
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def memory(self, path: Path | None = None, mode: Any = "r") -> NDArray[Any]:
        """Its values, mapped, from its file or from a copy of that at `path`. Raises what `values` raises."""
        return self.values(np.memmap(path or self.path, np.uint8, mode))

    def values(self, data: NDArray[np.uint8]) -> NDArray[Any]:
        """Its values among the bytes of its file. Raises FormatError for a type that is no plain float."""
        if self.type not in _FLOATS:
            raise FormatError(
                f"{self.path}: expected {quote(self.name)} as one of {', '.join(_FLOATS)}, got {quote(self.type)}; "
                "give a checkpoint that is not quantized"
            )
        values: NDArray[Any] = data[self.start : self.stop].view(_FLOATS[self.type]).reshape(self.shape)
        return values

    def rows(self) -> Iterator[NDArray[np.float32]]:
        """Its rows (n, width) in order, some at a time, as float32; a vector is one row."""
        return float32_rows(self.memory())


def read_safetensors(path: Path) -> list[Tensor]:
    """The tensors of the file `path`, in the header's order.

    Raises FormatError if its layout is not that of a safetensors file, SteerError where it cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size).ljust(_LENGTH.size, b"\0"))
            if not 0 < length <= size - _LENGTH.size:
                raise _refusal(path, f"a header of {length} bytes in {size}; the file is cut short")
            if length > _LARGEST_HEADER:
                raise _refusal(path, f"a header of {length} bytes, the most is {_LARGEST_HEADER}")
            header = file.read(length)
    except OSError as error:
        raise SteerError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    try:
        entries = json.loads(header.decode())
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"a header that is no JSON ({quote(str(error))})") from None
    if not isinstance(entries, dict):
        raise _refusal(path, f"{quote(entries)} as its header")
    _check_notes(path, entries.pop("__metadata__", {}))
    begin = end = _LENGTH.size + length
    tensors = [_tensor(path, name, entry, begin) for name, entry in entries.items()]
    for tensor in sorted(tensors, key=lambda each: (each.start, each.stop)):
        if tensor.start != end:
            raise _refusal(path, f"{quote(tensor.name)} at byte {tensor.start}, where {end} is the next that is free")
        end = tensor.stop
    if end != size:
        raise _refusal(path, f"tensors up to byte {end} of {size}")
    return tensors


def _refusal(path: Path, got: str) -> FormatError:
    return FormatError(f"{path}: expected a safetensors file, got {got}; fetch it again")


def _check_notes(path: Path, notes: Any) -> None:
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise _refusal(path, f"{quote(notes)} as its __metadata__")


def _tensor(path: Path, name: str, entry: Any, begin: int) -> Tensor:
    """The tensor of a header's `entry`, whose offsets count from byte `begin`."""
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [first, last]}:
            pass
        case _:
            raise _refusal(path, f"{quote(entry)} as the description of {quote(name)}")
    if len(shape) > _MOST_AXES or not all(map(_is_size, [*shape, first, last])):
        raise _refusal(path, f"{quote(name)} of shape {quote(shape)} at {quote([first, last])}")
    held = last - first
    if held < 0 or (kind in _BYTES and math.prod(shape) * _BYTES[kind] != held):
        raise _refusal(path, f"{quote(name)} of shape {quote(shape)} and type {kind} in {held} bytes")
    return Tensor(name, path, kind, tuple(shape), begin + first, begin + last)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


# --- numbers --------------------------------------------------------------------------------------------------------


def float32_rows(values: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    """The rows (n, width) of an array in order, some at a time, as float32; a vector is one row."""
    rows = values.reshape(-1, values.shape[-1])
    at_once = max(1, _BLOCK // rows.shape[1])
    for first in range(0, len(rows), at_once):
        yield to_float32(rows[first : first + at_once])


def to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Values as they stand in a file as float32; bfloat16 comes as its 16 bits."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def from_float32(values: NDArray[np.float32], like: np.dtype[Any]) -> NDArray[Any]:
    """float32 as the type of a file's values, rounded to nearest even."""
    if like == np.uint16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(like)


# --- written --------------------------------------------------------------------------------------------------------


def new_safetensors(path: Path, name: str, like: Tensor) -> NDArray[Any]:
    """A new file with one tensor of the type and shape of another, mapped for writing."""
    size = like.stop - like.start
    head = _head({name: {"dtype": like.type, "shape": list(like.shape), "data_offsets": [0, size]}})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    return Tensor(name, path, like.type, like.shape, len(head), len(head) + size).memory(mode="r+")


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write float32 tensors to a safetensors file."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, values in tensors.items():
        end = offset + values.size * 4
        entries[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    with path.open("wb") as file:
        file.write(_head(entries))
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, "<f4").tobytes())


def _head(entries: Mapping[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text
