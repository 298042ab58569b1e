"""A model's GGUF as bytes: its head taken apart and put together again, its tensors row by row from the mapped file.

Nothing here holds a whole tensor: what is read stays in the page cache, what is computed is a block of rows.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from edge_steer import tensor_types
from edge_steer.errors import FormatError
from edge_steer.gguf_metadata import Value
from edge_steer.gguf_tensors import TensorInfo, tensor_bytes
from edge_steer.model_file import ModelFile

Bytes = NDArray[np.uint8]
_BLOCK = 1 << 22  # values in a block of rows
_ALIGNMENT = 32
_HEADER = struct.Struct("<4sIQQ")
_NUMBERS = {
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "<u1",
}  # fmt: skip


@dataclass(frozen=True)
class Mapped:
    """A model file's bytes, mapped and not read. keys: those of its metadata as they stand."""

    model: ModelFile
    data: Bytes
    version: int
    key_count: int
    keys: Bytes
    alignment: int

    def bytes_of(self, tensor: TensorInfo) -> Bytes:
        """The tensor's data as they stand. Raises FormatError for a type whose size is not known."""
        start = self.model.data_start + tensor.offset
        return self.data[start : start + size_of(tensor)]

    def blocks(self, tensor: TensorInfo) -> Iterator[NDArray[np.float32]]:
        """The tensor as float32 (rows, width), some rows at a time; of experts, all rows of one after another."""
        width = tensor.shape[0]
        rows = self.bytes_of(tensor).reshape(-1, tensor_types.row_bytes(tensor.type, width))
        at_once = max(1, _BLOCK // width)
        for first in range(0, len(rows), at_once):
            yield tensor_types.to_float(tensor.type, rows[first : first + at_once], width)

    def vector(self, name: str) -> NDArray[np.float64]:
        """The values of the tensor `name`, flat: of a norm, a bias."""
        tensor = next(tensor for tensor in self.model.tensors if tensor.name == name)
        return np.concatenate([rows.ravel() for rows in self.blocks(tensor)]).astype(np.float64)


def size_of(tensor: TensorInfo) -> int:
    """Bytes of a tensor's data. Raises FormatError for a type that this release does not know."""
    size = tensor_bytes(tensor)
    if size is None:
        raise FormatError(f"expected tensor {tensor.name} of a known type, got type {tensor.type}; update edge-steer")
    return size


def map_model(model: ModelFile) -> Mapped:
    """The file of `model`, mapped. Raises FormatError if its head has changed since it was read."""
    data = np.memmap(model.path, np.uint8, "r")
    _, version, _, key_count = _HEADER.unpack(data[: _HEADER.size].tobytes())
    alignment = int(model.metadata.get("general.alignment", _ALIGNMENT))
    start, infos = model.tensors_start, np.frombuffer(_infos(model.tensors), np.uint8)
    if not np.array_equal(data[start : start + len(infos)], infos):
        raise FormatError(f"{model.path}: expected its tensors described at byte {start}, got others; read it again")
    return Mapped(model, data, version, key_count, data[_HEADER.size : start], alignment)


def head(source: Mapped, tensors: Sequence[TensorInfo], more: Mapping[str, Value] | None = None) -> bytes:
    """The head of a GGUF with `tensors`, with the metadata of `source` as it stands and `more` behind it."""
    added = more or {}
    header = _HEADER.pack(b"GGUF", source.version, len(tensors), source.key_count + len(added))
    plain = header + source.keys.tobytes() + _keys(added) + _infos(tensors)
    return plain + bytes(-len(plain) % source.alignment)


def write_float32(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write a GGUF of float32 tensors to `path`, over what is there."""
    infos, offset = [], 0
    for name, values in tensors.items():
        infos.append(TensorInfo(name, values.shape[::-1], GGMLQuantizationType.F32, offset))
        offset += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
    plain = _HEADER.pack(b"GGUF", 3, len(infos), len(metadata)) + _keys(metadata) + _infos(infos)
    with path.open("wb") as file:
        file.write(plain + bytes(-len(plain) % _ALIGNMENT))
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, "<f4").data)
            file.write(bytes(-values.nbytes % _ALIGNMENT))


def text(value: str) -> Value:
    """A string for a GGUF's metadata."""
    return Value(GGUFValueType.STRING, value)


def change_types(source: Mapped, kinds: Mapping[str, int], added: Sequence[TensorInfo] = ()) -> list[TensorInfo]:
    """The tensors of `source` in the order of their data and those `added`, some with other types, and where they then
    lie."""
    found, offset = [], 0
    for tensor in [*sorted(source.model.tensors, key=lambda each: each.offset), *added]:
        tensor = TensorInfo(tensor.name, tensor.shape, kinds.get(tensor.name, tensor.type), offset)
        found.append(tensor)
        offset += -(-size_of(tensor) // source.alignment) * source.alignment
    return found


def copy_bytes(data: Bytes, file: BinaryIO) -> None:
    """Write mapped bytes, a part at a time."""
    for start in range(0, len(data), 1 << 24):
        file.write(data[start : start + (1 << 24)].data)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _keys(values: Mapping[str, Value]) -> bytes:
    return b"".join(_text(key) + _value(value) for key, value in values.items())


def _value(value: Value) -> bytes:
    if value.item is None:
        return struct.pack("<I", value.type) + _item(value.type, value.value)
    start = struct.pack("<IIQ", value.type, value.item, len(value.value))
    if value.item == GGUFValueType.STRING:
        return start + b"".join(map(_text, value.value))
    return start + np.asarray(value.value).astype(_NUMBERS[value.item]).tobytes()


def _item(kind: GGUFValueType, item: Any) -> bytes:
    return _text(item) if kind == GGUFValueType.STRING else np.asarray(item, _NUMBERS[kind]).tobytes()


def _infos(tensors: Sequence[TensorInfo]) -> bytes:
    return b"".join(
        _text(tensor.name)
        + struct.pack(f"<I{len(tensor.shape)}QIQ", len(tensor.shape), *tensor.shape, tensor.type, tensor.offset)
        for tensor in tensors
    )
