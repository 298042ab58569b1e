"""The descriptions of tensors in a GGUF's head: where each lies, and how many bytes it takes."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES

from edge_steer.errors import FormatError, quote
from edge_steer.gguf_cursor import MAX_KEY_BYTES, U32, Cursor

_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 1 << 63
_QUANT_SIZES: dict[int, tuple[int, int]] = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in GGUF order (fastest axis first), `type` as in ggml, `offset` in bytes from data start."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def read_tensors(cursor: Cursor, count: int, alignment: int) -> tuple[TensorInfo, ...]:
    """The `count` descriptions of tensors at the cursor. Raises FormatError if one is malformed."""
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        start = cursor.at
        name = cursor.string("tensor name", MAX_KEY_BYTES)
        what = f"tensor {quote(name)}"
        (dimensions,) = cursor.unpack(U32, what)
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


def check_extent(cursor: Cursor, tensor: TensorInfo, data_start: int) -> None:
    """Raise FormatError where the data of `tensor` end behind the file's."""
    end = data_start + tensor.offset + (tensor_bytes(tensor) or 0)
    if end > cursor.size:
        raise FormatError(
            f"{cursor.path}: expected tensor {quote(tensor.name)} to end by byte {cursor.size}, the end of the file, "
            f"got byte {end}; the file is cut short: fetch it again"
        )
