"""ggml's types of tensors: names, numbers, sizes, and rows to float32 and back by ggml's own quantizers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from edge_steer import ggml
from edge_steer.compatibility import change_error
from edge_steer.errors import SteerError

Bytes = NDArray[np.uint8]
_F32 = int(GGMLQuantizationType.F32)
_SIZES: dict[int, tuple[int, int]] = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
# What ggml_quantize_chunk writes without measured importances. It ends the process for anything else.
_WRITABLE = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_M",
    "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip


def type_name(kind: int) -> str:
    """The name of a ggml type, such as Q4_K."""
    return GGMLQuantizationType(kind).name if kind in _SIZES else f"type {kind}"


def type_number(name: str) -> int:
    """The ggml type called `name`. Raises SteerError for one that cannot be written."""
    if name.upper() not in _WRITABLE:
        raise SteerError(f"expected a weight type among {', '.join(_WRITABLE)}, got {name!r}")
    return int(GGMLQuantizationType[name.upper()])


def check_writable(kind: int, width: int, tensor: str) -> None:
    """Raise SteerError where rows of `width` values cannot be written as ggml type `kind`."""
    if type_name(kind) not in _WRITABLE:
        raise SteerError(f"{tensor} is {type_name(kind)}, which cannot be written back; give --steered-type Q8_0")
    if width % _SIZES[kind][0]:
        raise SteerError(
            f"{tensor}: expected rows of a multiple of {_SIZES[kind][0]} for {type_name(kind)}, got {width}"
        )


def row_bytes(kind: int, width: int) -> int:
    """Bytes of one row of `width` values."""
    block, size = _SIZES[kind]
    return -(-width // block) * size


def is_quantized(kind: int) -> bool:
    """Whether values share a block with others."""
    return _SIZES[kind][0] > 1


def to_float(kind: int, rows: Bytes, width: int) -> NDArray[np.float32]:
    """Rows (n, row_bytes) of ggml type `kind` as float32 (n, width)."""
    rows = np.ascontiguousarray(rows)
    if kind == _F32:
        return np.array(rows.view("<f4"), np.float32)
    traits = _traits(kind)
    out = np.empty((len(rows), width), np.float32)
    ggml.ToFloat(traits.to_float)(rows.ctypes.data, out.ctypes.data, out.size)
    return out


def from_float(kind: int, rows: NDArray[np.float32]) -> Bytes:
    """Rows float32 (n, width) as ggml type `kind`, (n, row_bytes). On all cores: K-quants search for their scales."""
    rows = np.ascontiguousarray(rows, np.float32)
    count, width = rows.shape
    out = np.empty((count, row_bytes(kind, width)), np.uint8)
    quantize = ggml.base().ggml_quantize_chunk
    share = -(-count // (os.cpu_count() or 1))

    def write(first: int) -> int:
        part, to = rows[first : first + share], out[first : first + share]
        return int(quantize(kind, part.ctypes.data, to.ctypes.data, 0, len(part), width, None))

    with ThreadPoolExecutor() as threads:
        written = sum(threads.map(write, range(0, count, share)))
    assert written == out.size, (written, out.size)
    return out


@cache
def _traits(kind: int) -> ggml.TypeTraits:
    traits: ggml.TypeTraits = ggml.base().ggml_get_type_traits(kind).contents
    # Its fields must be where this release knows them.
    found = (traits.blck_size, traits.type_size) if traits.to_float else "none that can be read"
    if found != _SIZES[kind]:
        raise change_error(f"{type_name(kind)} in blocks of {_SIZES[kind]} values and bytes", str(found))
    return traits
