"""The native hook, from Python: loads the C library of native/steer.h and hands it ggml's functions.

All that depends on the layout of llama.cpp's memory is checked here, once, when the library is loaded.
Letters: S sites, d model width.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edge_steer
from edge_steer.errors import MismatchError, SteerError
from edge_steer.rotation import Ablate, Action, Add, TurnBy, TurnTo, cos_sin
from edge_steer.sites import Architecture, Site
from edge_steer.steering import Steering

ABI = 3
LLAMA_CPP_PYTHON = "0.3.36"
_INSTALL = f"pip install llama-cpp-python=={LLAMA_CPP_PYTHON}"

_STATUS = {
    1: "was given a bad argument",
    2: "ran out of memory",
    3: "found a tensor that is not F32",
    4: "found a tensor that is not contiguous",
    5: "found a tensor of another width",
    6: "found a tensor whose memory it cannot reach",
    7: "found a tensor whose device cannot turn it",
    8: "was told of an error by the device",
    9: "found a tensor that cannot be turned inside the graph",
}
_OP = {"selective": 0, "standard": 1, "adaptive": 1, "ablation": 2, "addition": 3}
_PATH = {"auto": 0, "host": 1, "copy": 2, "device": 3, "graph": 4}


# ggml's functions for the device path and for every path, in the order of steer.h.
_DEVICE_FUNCTIONS = (
    "ggml_backend_buffer_get_type", "ggml_backend_buft_get_device", "ggml_backend_dev_type", "ggml_backend_dev_init",
    "ggml_backend_dev_supports_op", "ggml_backend_free", "ggml_backend_get_default_buffer_type",
    "ggml_backend_graph_compute", "ggml_backend_alloc_ctx_tensors", "ggml_backend_buffer_free",
    "ggml_backend_tensor_alloc", "ggml_backend_tensor_set", "ggml_gallocr_new", "ggml_gallocr_reserve",
    "ggml_gallocr_alloc_graph", "ggml_gallocr_free", "ggml_init", "ggml_reset", "ggml_free", "ggml_tensor_overhead",
    "ggml_graph_overhead_custom", "ggml_new_graph_custom", "ggml_build_forward_expand", "ggml_graph_n_nodes",
    "ggml_graph_node", "ggml_new_tensor_2d", "ggml_view_2d", "ggml_mul_mat", "ggml_add_inplace", "ggml_sub",
    "ggml_mul", "ggml_scale", "ggml_sqr", "ggml_sqrt", "ggml_sum_rows", "ggml_step",
)  # fmt: skip
_FUNCTIONS = (
    "ggml_get_name", "ggml_nelements", "ggml_nrows", "ggml_is_contiguous", "ggml_get_data",
    "ggml_backend_buffer_is_host", "ggml_backend_tensor_get", "ggml_backend_tensor_set",
)  # fmt: skip
_DEVICE_TYPE_CPU = 0
_PARAMS = 64  # GGML_MAX_OP_PARAMS, bytes
_ALL_THREADS = -1  # GGML_N_TASKS_MAX
# Where ggml's tensor has the fields for which it exports no getter.
_TYPE, _BUFFER, _OP_NUMBER, _OP_PARAMS, _SOURCES = 0, 8, 80, 84, 152


class _DeviceGgml(ctypes.Structure):
    """struct steer_device_ggml."""

    _fields_ = (*((name, c_void_p) for name in _DEVICE_FUNCTIONS), ("host_device", c_void_p), ("type_f32", c_int32))


class _GraphGgml(ctypes.Structure):
    """struct steer_graph_ggml."""

    _fields_ = (
        *((name, c_size_t) for name in ("op_offset", "params_offset", "source_offset", "user_data_offset")),
        *((name, c_int32) for name in ("op_mul", "op_add", "op_custom")),
        ("custom_params", ctypes.c_ubyte * _PARAMS),
    )


class _Ggml(ctypes.Structure):
    """struct steer_ggml."""

    _fields_ = (
        *((name, c_void_p) for name in _FUNCTIONS),
        ("type_offset", c_size_t),
        ("buffer_offset", c_size_t),
        ("type_f32", c_int32),
        ("device", POINTER(_DeviceGgml)),
        ("graph", POINTER(_GraphGgml)),
    )


class _Record(ctypes.Structure):
    """struct steer_record."""

    _fields_ = tuple((name, c_void_p) for name in ("sum", "sum_unit", "sum_norm", "count", "rows"))


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Charges(ctypes.Structure):
    """struct choose_charges."""

    _fields_ = (
        ("repeat", c_float), ("frequency", c_float), ("presence", c_float), ("n", c_int32), ("said", c_void_p),
        ("kept", c_void_p),
    )  # fmt: skip


@dataclass(frozen=True)
class Record:
    """Where the hook adds the last row h at every site. Zeroed by `Record.zeros`."""

    sum: NDArray[np.float64]  # (S, d) Σh
    sum_unit: NDArray[np.float64]  # (S, d) Σh/‖h‖
    sum_norm: NDArray[np.float64]  # (S,) Σ‖h‖
    count: NDArray[np.int64]  # (S,) rows added
    rows: NDArray[np.float32]  # (S, d) the latest h

    @classmethod
    def zeros(cls, sites: int, width: int) -> Record:
        return cls(
            np.zeros((sites, width)), np.zeros((sites, width)), np.zeros(sites), np.zeros(sites, np.int64),
            np.zeros((sites, width), np.float32),
        )  # fmt: skip


def ggml_library(name: str) -> ctypes.CDLL:
    """The ggml that llama.cpp itself runs on, through llama.cpp's own handle: symbols are found in what it links to.

    A wheel holds each library under three names, as copies: to load one by its file name would be a second ggml with
    globals of its own. On Windows, where there is one copy and no such search, it is the library `name`. A function
    that this build lacks is an AttributeError, a library that it lacks on Windows a FileNotFoundError.
    """
    from llama_cpp import llama_cpp as bindings
    from llama_cpp._ctypes_extensions import load_shared_library

    if sys.platform == "win32":
        library: ctypes.CDLL = load_shared_library(name, Path(bindings.__file__).parent / "lib")
        return library
    return ctypes.CDLL(bindings._lib._name, handle=bindings._lib._handle)


@cache
def _ggml() -> tuple[ctypes.CDLL, _Ggml]:
    """libggml-base, and ggml's functions for the hook. Raises MismatchError if they do not fit."""
    import llama_cpp

    if llama_cpp.__version__ != LLAMA_CPP_PYTHON:
        raise MismatchError(f"expected llama-cpp-python {LLAMA_CPP_PYTHON}, found {llama_cpp.__version__}; {_INSTALL}")
    lib, registry = ggml_library("ggml-base"), ggml_library("ggml")

    def addresses(names: Sequence[str]) -> list[int]:
        return [ctypes.cast(getattr(lib, name), c_void_p).value or 0 for name in names]

    _check_layout(lib)
    registry.ggml_backend_dev_by_type.argtypes = [c_int32]
    registry.ggml_backend_dev_by_type.restype = c_void_p
    cpu = registry.ggml_backend_dev_by_type(_DEVICE_TYPE_CPU)
    device = _DeviceGgml(*addresses(_DEVICE_FUNCTIONS), cpu, llama_cpp.GGML_TYPE_F32)
    return lib, _Ggml(
        *addresses(_FUNCTIONS), _TYPE, _BUFFER, llama_cpp.GGML_TYPE_F32, ctypes.pointer(device),
        ctypes.pointer(_graph_ggml(lib)),
    )  # fmt: skip


def _other_layout() -> MismatchError:
    return MismatchError(f"this llama.cpp lays its tensors out in another way than edge-steer knows; {_INSTALL}")


@contextmanager
def _tensor_context(lib: ctypes.CDLL, tensors: int) -> Iterator[int]:
    """A ggml context with room for so many tensors, without their data."""
    lib.ggml_init.argtypes, lib.ggml_init.restype = [_InitParams], c_void_p
    lib.ggml_free.argtypes, lib.ggml_free.restype = [c_void_p], None
    lib.ggml_tensor_overhead.argtypes, lib.ggml_tensor_overhead.restype = [], c_size_t
    lib.ggml_new_tensor_1d.argtypes, lib.ggml_new_tensor_1d.restype = [c_void_p, c_int32, c_int64], c_void_p
    context = lib.ggml_init(_InitParams((tensors + 1) * lib.ggml_tensor_overhead(), None, True))
    try:
        yield context
    finally:
        lib.ggml_free(context)


def _check_layout(lib: ctypes.CDLL) -> None:
    """ggml exports no getter for a tensor's type and buffer: compare both fields with tensors made through its API."""
    lib.ggml_backend_cpu_buffer_type.argtypes, lib.ggml_backend_cpu_buffer_type.restype = [], c_void_p
    lib.ggml_backend_alloc_ctx_tensors_from_buft.argtypes = [c_void_p, c_void_p]
    lib.ggml_backend_alloc_ctx_tensors_from_buft.restype = c_void_p
    lib.ggml_backend_buffer_free.argtypes, lib.ggml_backend_buffer_free.restype = [c_void_p], None

    types = (0, 1, 24)  # F32, F16, I8
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


def _graph_ggml(lib: ctypes.CDLL) -> _GraphGgml:
    """The numbers of three operators and a custom operator's parameters, read from nodes made through ggml's API.

    Raises MismatchError where a node's sources, or the marks that are given as user data, do not lie as expected.
    """
    two, pointers = [c_void_p, c_void_p, c_void_p], POINTER(c_void_p)
    lib.ggml_mul.argtypes, lib.ggml_mul.restype = two, c_void_p
    lib.ggml_add.argtypes, lib.ggml_add.restype = two, c_void_p
    lib.ggml_custom_4d.argtypes = [
        c_void_p, c_int32, *[c_int64] * 4, pointers, c_int32, c_void_p, c_int32, c_void_p,
    ]  # fmt: skip
    lib.ggml_custom_4d.restype = c_void_p
    turn, marks = ctypes.cast(library().steer_in_graph, c_void_p), (0x1122334455667788, 0x0807060504030201)
    with _tensor_context(lib, 6) as context:
        a, b = (lib.ggml_new_tensor_1d(context, 0, 32) for _ in range(2))
        product, total = lib.ggml_mul(context, a, b), lib.ggml_add(context, a, b)
        custom, other = (
            lib.ggml_custom_4d(context, 0, 32, 1, 1, 1, (c_void_p * 2)(a, b), 2, turn, _ALL_THREADS, mark)
            for mark in marks
        )
        nodes = (product, total, custom)
        numbers = [c_int32.from_address(node + _OP_NUMBER).value for node in nodes]
        params = [ctypes.string_at(node + _OP_PARAMS, _PARAMS) for node in (*nodes, other)]
        sources = [[c_void_p.from_address(node + _SOURCES + 8 * i).value for i in (0, 1, 2)] for node in nodes]
    where = [each.find(mark.to_bytes(8, sys.byteorder)) for each, mark in zip(params[2:], marks, strict=True)]
    begins = params[2].startswith((turn.value or 0).to_bytes(8, sys.byteorder))  # its function comes first
    expected = begins and where[0] == where[1] >= 0 and len(set(numbers)) == 3 and not any(params[0] + params[1])
    if not expected or sources != [[a, b, None]] * 3:
        raise _other_layout()
    template = (ctypes.c_ubyte * _PARAMS)(*params[2])
    return _GraphGgml(_OP_NUMBER, _OP_PARAMS, _SOURCES, where[0], *numbers, template)


@cache
def library() -> ctypes.CDLL:
    """libsteer, with the signatures of steer.h and choose.h."""
    for folder in edge_steer.__path__:
        for found in (Path(folder) / "runtime").glob("libsteer.*"):
            lib = ctypes.CDLL(str(found))
            break
        else:
            continue
        break
    else:
        raise SteerError("edge-steer's native library is not built; install it with: pip install .")
    lib.steer_abi.restype = c_int32
    if lib.steer_abi() != ABI:
        raise MismatchError(f"expected the native library's ABI {ABI}, found {lib.steer_abi()}; pip install . again")
    lib.steer_new.argtypes = [
        POINTER(_Ggml), c_int64, c_int32, POINTER(c_char_p), c_void_p, c_void_p, c_void_p, POINTER(c_void_p),
    ]  # fmt: skip
    lib.steer_free.argtypes, lib.steer_free.restype = [c_void_p], None
    lib.steer_set_path.argtypes = [c_void_p, c_int32]
    lib.steer_add.argtypes = [
        c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, POINTER(c_int32),
    ]  # fmt: skip
    lib.steer_dial.argtypes = [c_void_p, c_int32, POINTER(c_double)]
    lib.steer_set_record.argtypes = [c_void_p, POINTER(_Record)]
    lib.steer_take_status.argtypes = [c_void_p, POINTER(c_int32)]
    lib.steer_rows.argtypes = [c_void_p, c_int32, c_void_p, c_int64]
    lib.choose_charge.argtypes = [POINTER(Charges), c_void_p, c_int32]
    lib.choose_restore.argtypes = [POINTER(Charges), c_void_p, c_int32]
    lib.choose_likeliest.argtypes = [POINTER(Charges), c_void_p, c_int32, POINTER(c_int32)]
    lib.steer_names.argtypes, lib.steer_names.restype = [c_void_p, c_char_p, c_size_t], c_size_t
    return lib


def _dial(action: Action) -> Any:
    """{x, y, z} of steer_dial. cos − 1 is formed in double: in float it would lose small angles."""
    match action:
        case TurnBy(degrees):
            c, s = cos_sin(degrees)
            xyz = (c - 1, s, 0.0)
        case TurnTo(degrees, threshold):
            xyz = (*cos_sin(degrees), -np.inf if threshold is None else threshold)
        case Ablate():
            xyz = (0.0, 0.0, 0.0)
        case Add(alpha):
            xyz = (alpha, 0.0, 0.0)
    return (c_double * 3)(*xyz)


class Hook:
    """One hook of steer.h, for one context: what it knows of a model are its sites and its width.

    `EDGE_STEER_PATH` = graph, host, device or copy forces how it reaches a tensor's memory, for tests.
    """

    def __init__(self, architecture: Architecture, sites: Sequence[Site], width: int) -> None:
        self._pointer = c_void_p()
        self._lib = library()
        _, ggml = _ggml()
        self.sites = tuple(sites)
        self.width = width
        self.reached = np.zeros(len(self.sites), np.int64)
        self.turned = np.zeros(len(self.sites), np.int64)
        self._number = {site: number for number, site in enumerate(self.sites)}
        kinds = (c_char_p * len(self.sites))(*(architecture.kinds[site.kind].tensor.encode() for site in self.sites))
        layers = np.array([site.layer for site in self.sites], np.int32)
        self._check(
            self._lib.steer_new(
                ctypes.byref(ggml), width, len(self.sites), kinds, layers.ctypes.data, self.reached.ctypes.data,
                self.turned.ctypes.data, ctypes.byref(self._pointer),
            )
        )  # fmt: skip
        path = os.environ.get("EDGE_STEER_PATH", "auto")
        if path not in _PATH:
            raise SteerError(f"expected EDGE_STEER_PATH to be one of {', '.join(_PATH)}, got {path!r}")
        self._check(self._lib.steer_set_path(self._pointer, _PATH[path]))
        self._record: Record | None = None

    @property
    def callback(self) -> int:
        """Address of the function for llama.cpp's cb_eval."""
        return ctypes.cast(self._lib.steer_eval, c_void_p).value or 0

    @property
    def user_data(self) -> int:
        """What cb_eval is to be given."""
        return self._pointer.value or 0

    def add(self, steering: Steering) -> int:
        """Append a steering, off, behind those already there; returns its number."""
        numbers = np.array([self._number[site] for site in steering.steered], np.int32)
        order = np.argsort(numbers)  # an import may list its sites in another order
        sites = numbers[order]
        planes = steering.site_plane[steering.mask][order].astype(np.int32)
        scale = np.nan_to_num(steering.mean_norm[steering.mask][order]).astype(np.float32)
        basis = np.ascontiguousarray(steering.basis)
        number = c_int32()
        self._check(
            self._lib.steer_add(
                self._pointer, _OP[steering.operator], len(sites), sites.ctypes.data, planes.ctypes.data,
                scale.ctypes.data, len(basis), basis.ctypes.data, ctypes.byref(number),
            )
        )  # fmt: skip
        return number.value

    def dial(self, number: int, action: Action | None) -> None:
        """Let steering `number` do `action` from the next decode on; None is off."""
        self._check(self._lib.steer_dial(self._pointer, number, None if action is None else _dial(action)))

    def record(self, to: Record | None) -> None:
        """Record the last row of every site's tensor into `to` until called with None."""
        self._record = to  # the arrays must live while the hook writes to them
        if to is None:
            self._check(self._lib.steer_set_record(self._pointer, None))
            return
        arrays = (to.sum, to.sum_unit, to.sum_norm, to.count, to.rows)
        self._check(
            self._lib.steer_set_record(self._pointer, ctypes.byref(_Record(*(array.ctypes.data for array in arrays))))
        )

    def check_status(self) -> None:
        """Raise SteerError if a decode since the last call met a tensor it could not act on."""
        site = c_int32()
        status = self._lib.steer_take_status(self._pointer, ctypes.byref(site))
        if status:
            raise SteerError(f"the native hook {_STATUS.get(status, f'failed ({status})')} at {self.sites[site.value]}")

    def rows(self, site: Site, h: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is on at `site`, applied to activations h: (n, d); returns the turned copy."""
        turned = np.array(h, np.float32, order="C")
        self._check(self._lib.steer_rows(self._pointer, self._number[site], turned.ctypes.data, len(turned)))
        return turned

    def node_names(self) -> list[str]:
        """Names of the graph nodes that came by, sorted, cut at 23 bytes."""
        size = self._lib.steer_names(self._pointer, None, 0)
        text = ctypes.create_string_buffer(size)
        self._lib.steer_names(self._pointer, text, size)
        return sorted(text.value.decode(errors="replace").splitlines())

    def close(self) -> None:
        """Free it. The context that calls it must be gone."""
        if self._pointer:
            self._lib.steer_free(self._pointer)
            self._pointer = c_void_p()

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self.close()

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise SteerError(f"the native hook {_STATUS.get(status, f'failed ({status})')}")


def check_library() -> None:
    """Raise SteerError where the native library or llama.cpp's tensors are not as this release knows them."""
    library()
    _ggml()
