"""ggml: the libraries that llama.cpp runs on, their functions, and how a tensor of theirs lies in memory.

Nothing else in edge-steer opens a library of ggml's. A wheel holds each under three names, as copies: to load one by
its file name would be a second ggml with globals of its own, whose abort callback, for one, is never called.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edge_steer.compatibility import change_error
from edge_steer.errors import MismatchError

CPU, GPU, INTEGRATED_GPU = range(3)  # enum ggml_backend_dev_type
F32, F16, I8 = 0, 1, 24  # enum ggml_type
ALL_THREADS = -1  # GGML_N_TASKS_MAX
PARAMS = 64  # GGML_MAX_OP_PARAMS, bytes
# Where ggml's tensor has the fields for which it exports no getter.
_TYPE, _BUFFER, _OP_NUMBER, _OP_PARAMS, _SOURCES = 0, 8, 80, 84, 152

AbortCallback = ctypes.CFUNCTYPE(None, c_char_p)
ToFloat = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)  # rows, float32 out, values


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = (
        ("type_name", c_char_p), ("blck_size", c_int64), ("blck_size_interleave", c_int64), ("type_size", c_size_t),
        ("is_quantized", c_bool), ("to_float", c_void_p), ("from_float_ref", c_void_p),
    )  # fmt: skip


_Signatures = dict[str, tuple[Any, list[Any]]]  # by function: its result, its arguments
_BASE: _Signatures = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_new_tensor_1d": (c_void_p, [c_void_p, c_int, c_int64]),
    "ggml_mul": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_add": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_custom_4d": (
        c_void_p, [c_void_p, c_int, *[c_int64] * 4, POINTER(c_void_p), c_int, c_void_p, c_int, c_void_p],
    ),
    "ggml_get_type_traits": (POINTER(TypeTraits), [c_int]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_set_abort_callback": (c_void_p, [AbortCallback]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_dev_type": (c_int, [c_void_p]),
    "ggml_backend_reg_dev_count": (c_size_t, [c_void_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
}  # fmt: skip
_REGISTRY: _Signatures = {
    "ggml_backend_dev_by_type": (c_void_p, [c_int]),
    "ggml_backend_dev_count": (c_size_t, []),
    "ggml_backend_dev_get": (c_void_p, [c_size_t]),
}
_RPC: _Signatures = {
    "ggml_backend_rpc_add_server": (c_void_p, [c_char_p]),
    "ggml_backend_rpc_start_server": (None, [c_char_p, c_char_p, c_size_t, c_size_t, POINTER(c_void_p)]),
}


# --- libraries and functions ------------------------------------------------------------------------------------------


@cache
def base() -> ctypes.CDLL:
    """ggml-base: tensors, buffers, graphs, types, with a tensor's layout checked. Raises MismatchError."""
    lib = _bound(_open("ggml-base"), _BASE)
    _check_layout(lib)
    return lib


@cache
def registry() -> ctypes.CDLL:
    """ggml: the devices that this build knows. Raises MismatchError."""
    return _bound(_open("ggml"), _REGISTRY)


@cache
def rpc() -> ctypes.CDLL | None:
    """ggml-rpc; None where llama.cpp is built without it."""
    try:
        lib = _open("ggml-rpc")
    except FileNotFoundError:
        return None
    return _bound(lib, _RPC) if hasattr(lib, "ggml_backend_rpc_add_server") else None


def addresses(names: Iterable[str]) -> dict[str, int]:
    """Where functions of ggml-base lie. Raises MismatchError for one that is not there."""
    lib = base()
    return {name: ctypes.cast(_function(lib, name), c_void_p).value or 0 for name in names}


def cpu_device() -> int | None:
    """The CPU, as a device of ggml's."""
    found: int | None = registry().ggml_backend_dev_by_type(CPU)
    return found


def local_devices(kind: int) -> list[int]:
    """This machine's devices of a kind."""
    devices = [registry().ggml_backend_dev_get(i) for i in range(registry().ggml_backend_dev_count())]
    return [device for device in devices if base().ggml_backend_dev_type(device) == kind]


def _open(name: str) -> ctypes.CDLL:
    """Library `name` through llama.cpp's own handle: functions are found in what llama.cpp links to.

    On Windows, where there is one copy of each and no such search, it is the file. FileNotFoundError where that lacks.
    """
    from llama_cpp import llama_cpp as bindings

    if sys.platform == "win32":
        from llama_cpp._ctypes_extensions import load_shared_library

        library: ctypes.CDLL = load_shared_library(name, Path(bindings.__file__).parent / "lib")
        return library
    handle = getattr(getattr(bindings, "_lib", None), "_handle", None)
    if handle is None:
        raise change_error("llama_cpp.llama_cpp._lib, its handle of llama.cpp", "none")
    return ctypes.CDLL(bindings._lib._name, handle=handle)


def _bound(lib: ctypes.CDLL, signatures: _Signatures) -> ctypes.CDLL:
    for name, (result, arguments) in signatures.items():
        function = _function(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _function(lib: ctypes.CDLL, name: str) -> Any:
    try:
        return getattr(lib, name)
    except AttributeError:
        raise change_error(f"a ggml with the function {name}", "one without") from None


# --- how a tensor lies in memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CustomOperator:
    """What a node of ggml's becomes where it calls a function of ours: offsets in a tensor, numbers of operators."""

    op_offset: int
    params_offset: int
    source_offset: int
    user_data_offset: int  # in the parameters
    op_mul: int
    op_add: int
    op_custom: int
    params: bytes  # PARAMS, with the function, on all threads


def tensor_offsets() -> tuple[int, int]:
    """Where a tensor has its type and its buffer."""
    base()
    return _TYPE, _BUFFER


def custom_operator(function: int) -> CustomOperator:
    """The custom operator that calls `function`, and two others' numbers, read from nodes made through ggml's API.

    Raises MismatchError if a node's sources, or the marks that are given as user data, do not lie as expected.
    """
    lib, marks = base(), (0x1122334455667788, 0x0807060504030201)
    with _tensor_context(lib, 6) as context:
        a, b = (lib.ggml_new_tensor_1d(context, F32, 32) for _ in range(2))
        product, total = lib.ggml_mul(context, a, b), lib.ggml_add(context, a, b)
        custom, other = (
            lib.ggml_custom_4d(context, F32, 32, 1, 1, 1, (c_void_p * 2)(a, b), 2, function, ALL_THREADS, mark)
            for mark in marks
        )
        nodes = (product, total, custom)
        numbers = [c_int32.from_address(node + _OP_NUMBER).value for node in nodes]
        params = [ctypes.string_at(node + _OP_PARAMS, PARAMS) for node in (*nodes, other)]
        sources = [[c_void_p.from_address(node + _SOURCES + 8 * i).value for i in (0, 1, 2)] for node in nodes]
    where = [each.find(mark.to_bytes(8, sys.byteorder)) for each, mark in zip(params[2:], marks, strict=True)]
    begins = params[2].startswith(function.to_bytes(8, sys.byteorder))  # its function comes first
    expected = begins and where[0] == where[1] >= 0 and len(set(numbers)) == 3 and not any(params[0] + params[1])
    if not expected or sources != [[a, b, None]] * 3:
        raise _other_layout()
    mul, add, own = numbers
    return CustomOperator(_OP_NUMBER, _OP_PARAMS, _SOURCES, where[0], mul, add, own, params[2])


@contextmanager
def _tensor_context(lib: ctypes.CDLL, tensors: int) -> Iterator[int]:
    """A ggml context with room for so many tensors, without their data."""
    context = lib.ggml_init(InitParams((tensors + 1) * lib.ggml_tensor_overhead(), None, True))
    try:
        yield context
    finally:
        lib.ggml_free(context)


def _check_layout(lib: ctypes.CDLL) -> None:
    """ggml exports no getter for a tensor's type and buffer: compare both fields with tensors made through its API."""
    types = (F32, F16, I8)
    with _tensor_context(lib, len(types)) as context:
        tensors = [lib.ggml_new_tensor_1d(context, type_, 32) for type_ in types]
        buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, lib.ggml_backend_cpu_buffer_type())
        try:
            found = [
                (c_int32.from_address(tensor + _TYPE).value, c_void_p.from_address(tensor + _BUFFER).value)
                for tensor in tensors
            ]
        finally:
            lib.ggml_backend_buffer_free(buffer)
    if found != [(type_, buffer) for type_ in types]:
        raise _other_layout()


def _other_layout() -> MismatchError:
    return change_error("ggml's tensors as edge-steer knows them", "a ggml that lays its tensors out in another way")
