"""The native library of native/steer.h and native/choose.h, and ggml's functions as it is given them.

What lies on both sides of the boundary is laid out by what the library itself reports (`steer_fields`): ggml's
functions are bound by the names that stand there, and every field must lie where the library has it.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_ubyte, c_void_p
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import edge_steer
from edge_steer import compatibility, ggml
from edge_steer.errors import MismatchError, SteerError

ABI = 7
_AGAIN = "pip install . again"


class _Field(ctypes.Structure):
    """struct steer_field."""

    _fields_ = (("structure", c_char_p), ("field", c_char_p), ("offset", c_size_t), ("size", c_size_t))


class GraphGgml(ctypes.Structure):
    """struct steer_graph_ggml."""

    _fields_ = (
        *((name, c_size_t) for name in ("op_offset", "params_offset", "source_offset", "user_data_offset")),
        *((name, c_int32) for name in ("op_mul", "op_add", "op_custom")),
        ("custom_params", c_ubyte * ggml.PARAMS),
    )


class RecordAddresses(ctypes.Structure):
    """struct steer_record."""

    _fields_ = (
        *((name, c_void_p) for name in ("sum", "sum_unit", "sum_norm", "count", "rows")),
        ("last", c_int64),
    )


class ReadingAddresses(ctypes.Structure):
    """struct steer_reading."""

    _fields_ = (
        ("site", c_int32), ("axis", c_void_p), ("gain", c_double), ("offset", c_double), ("to", c_void_p),
        ("room", c_int64), ("at", c_int64),
    )  # fmt: skip


class Charges(ctypes.Structure):
    """struct choose_charges."""

    _fields_ = (
        ("repeat", c_float), ("frequency", c_float), ("presence", c_float), ("n", c_int32), ("said", c_void_p),
        ("kept", c_void_p),
    )  # fmt: skip


_STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "steer_graph_ggml": GraphGgml,
    "steer_ggml_init": ggml.InitParams,
    "steer_record": RecordAddresses,
    "steer_reading": ReadingAddresses,
    "choose_charges": Charges,
}
# Fields behind ggml's functions, in the two structures that begin with those.
_BEHIND_FUNCTIONS: dict[str, tuple[tuple[str, Any], ...]] = {
    "steer_device_ggml": (("host_device", c_void_p), ("type_f32", c_int32)),
    "steer_ggml": (
        ("type_offset", c_size_t), ("buffer_offset", c_size_t), ("type_f32", c_int32), ("device", c_void_p),
        ("graph", c_void_p),
    ),
}  # fmt: skip

_Rows = list[tuple[str, int, int]]  # field, offset, size; the structure itself is the field ""


@cache
def library() -> ctypes.CDLL:
    """libsteer, with the signatures of steer.h and choose.h. Raises SteerError if it is not built or another's."""
    lib = ctypes.CDLL(str(_find()))
    lib.steer_abi.restype = c_int32
    if lib.steer_abi() != ABI:
        raise MismatchError(f"expected the native library's ABI {ABI}, found {lib.steer_abi()}; {_AGAIN}")
    lib.steer_fields.restype = POINTER(_Field)
    rows = _read_layouts(lib)
    for name in {*rows, *_STRUCTURES, *_BEHIND_FUNCTIONS}:
        _structure(name, rows.get(name, []))
    lib.steer_new.argtypes = [
        c_void_p, c_int64, c_int32, POINTER(c_char_p), c_void_p, c_void_p, c_void_p, POINTER(c_void_p),
    ]  # fmt: skip
    lib.steer_free.argtypes, lib.steer_free.restype = [c_void_p], None
    lib.steer_set_path.argtypes = [c_void_p, c_int32]
    lib.steer_went_inside.argtypes, lib.steer_went_inside.restype = [c_void_p], c_bool
    lib.steer_add.argtypes = [
        c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, POINTER(c_int32),
    ]  # fmt: skip
    lib.steer_dial.argtypes = [c_void_p, c_int32, POINTER(c_double)]
    lib.steer_set_record.argtypes = [c_void_p, POINTER(RecordAddresses)]
    lib.steer_set_readings.argtypes = [c_void_p, c_int32, c_void_p]
    lib.steer_take_status.argtypes = [c_void_p, POINTER(c_int32)]
    lib.steer_rows.argtypes = [c_void_p, c_int32, c_void_p, c_int64]
    lib.choose_charge.argtypes = [POINTER(Charges), c_void_p, c_int32]
    lib.choose_restore.argtypes = [POINTER(Charges), c_void_p, c_int32]
    lib.choose_likeliest.argtypes = [POINTER(Charges), c_void_p, c_int32, POINTER(c_int32)]
    lib.steer_names.argtypes, lib.steer_names.restype = [c_void_p, c_char_p, c_size_t], c_size_t
    return lib


@cache
def bound_ggml() -> ctypes.Structure:
    """struct steer_ggml: what the hook knows of ggml. Raises MismatchError if llama.cpp is not as it is known."""
    compatibility.check()
    rows = _read_layouts(library())
    turn = ctypes.cast(library().steer_in_graph, c_void_p).value or 0
    custom = ggml.custom_operator(turn)
    graph = GraphGgml(
        op_offset=custom.op_offset, params_offset=custom.params_offset, source_offset=custom.source_offset,
        user_data_offset=custom.user_data_offset, op_mul=custom.op_mul, op_add=custom.op_add,
        op_custom=custom.op_custom, custom_params=(c_ubyte * ggml.PARAMS)(*custom.params),
    )  # fmt: skip
    devices, every_path = (
        ggml.addresses(_functions(rows[structure])) for structure in ("steer_device_ggml", "steer_ggml")
    )
    device = _structure("steer_device_ggml", rows["steer_device_ggml"])(
        **devices, host_device=ggml.cpu_device(), type_f32=ggml.F32
    )
    type_offset, buffer_offset = ggml.tensor_offsets()
    bound = _structure("steer_ggml", rows["steer_ggml"])(
        **every_path, type_offset=type_offset, buffer_offset=buffer_offset, type_f32=ggml.F32,
        device=ctypes.addressof(device), graph=ctypes.addressof(graph),
    )  # fmt: skip
    bound.kept = (device, graph)  # it holds their addresses only
    return bound


def check_library() -> None:
    """Raise SteerError where the native library or llama.cpp is not as this release knows it."""
    library()
    bound_ggml()


def _find() -> Path:
    for folder in edge_steer.__path__:
        for found in (Path(folder) / "runtime").glob("libsteer.*"):
            return found
    raise SteerError("edge-steer's native library is not built; install it with: pip install .")


def _read_layouts(lib: ctypes.CDLL) -> dict[str, _Rows]:
    """How the library lays out each structure that is filled here."""
    rows: dict[str, _Rows] = {}
    for row in lib.steer_fields():
        if row.structure is None:
            break
        rows.setdefault(row.structure.decode(), []).append((row.field.decode(), row.offset, row.size))
    return rows


def _functions(rows: _Rows) -> list[str]:
    return [field for field, _, _ in rows if field.startswith("ggml_")]


def _structure(name: str, rows: _Rows) -> type[ctypes.Structure]:
    """The structure `name` for ctypes. Raises MismatchError if a field does not lie as the library has it."""
    if name in _BEHIND_FUNCTIONS:
        fields = (*((function, c_void_p) for function in _functions(rows)), *_BEHIND_FUNCTIONS[name])
        structure: type[ctypes.Structure] = type(name, (ctypes.Structure,), {"_fields_": fields})
    elif name in _STRUCTURES:
        structure = _STRUCTURES[name]
    else:
        raise MismatchError(f"expected no struct {name} in the native library; {_AGAIN}")
    described = [(field, getattr(structure, field)) for field, *_ in structure._fields_]
    here = [*((field, at.offset, at.size) for field, at in described), ("", 0, ctypes.sizeof(structure))]
    for ours, theirs in zip_longest(here, rows):
        if ours != theirs:
            raise MismatchError(f"expected struct {name} with {ours} (field, offset, size), found {theirs}; {_AGAIN}")
    return structure
