"""The native hook of native/steer.h, from Python: what llama.cpp calls while it computes, with its steerings and dials.

Letters: S sites, d model width.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_int32, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.rotation import Ablate, Action, Add, TurnBy, TurnTo, cos_sin
from edge_steer.runtime import native
from edge_steer.sites import Architecture, Site
from edge_steer.steering import Steering

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
_PATH = {"auto": 0, "host": 1, "copy": 2, "device": 3, "graph": 4, "stop": 5}


@dataclass(frozen=True)
class Record:
    """Where the hook adds the last R rows h at every site, 1 or more. Zeroed by `Record.zeros`."""

    sum: NDArray[np.float64]  # (S, d) Σh
    sum_unit: NDArray[np.float64]  # (S, d) Σh/‖h‖
    sum_norm: NDArray[np.float64]  # (S,) Σ‖h‖
    count: NDArray[np.int64]  # (S,) rows added
    rows: NDArray[np.float32]  # (S, R, d) the latest h

    @classmethod
    def zeros(cls, sites: int, width: int, rows: int = 1) -> Record:
        return cls(
            np.zeros((sites, width)), np.zeros((sites, width)), np.zeros(sites), np.zeros(sites, np.int64),
            np.zeros((sites, rows, width), np.float32),
        )  # fmt: skip

    def add(self, other: Record) -> None:
        """Add another's sums and counts; its latest rows stay its own."""
        for mine, its in (
            (self.sum, other.sum), (self.sum_unit, other.sum_unit), (self.sum_norm, other.sum_norm),
            (self.count, other.count),
        ):  # fmt: skip
            np.add(mine, its, out=mine)


@dataclass(frozen=True)
class Reading:
    """Where the hook reads the rows h of a site: gain·(h·axis) + offset, before they are turned there. to: (n,)
    float32, one value a row from where `Hook.read_from` says."""

    site: Site
    axis: NDArray[np.float32]  # (d,)
    gain: float
    offset: float
    to: NDArray[np.float32]


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

    `EDGE_STEER_HOOK` says how it reaches a tensor's memory: auto, or stop, which never changes a node of llama.cpp's
    graph; for tests also graph, host, device and copy, each of which is then the only way.
    """

    def __init__(self, architecture: Architecture, sites: Sequence[Site], width: int) -> None:
        self._pointer = c_void_p()
        self._lib = native.library()
        self._ggml = native.bound_ggml()
        self.sites = tuple(sites)
        self.width = width
        self.reached = np.zeros(len(self.sites), np.int64)
        self.turned = np.zeros(len(self.sites), np.int64)
        self._number = {site: number for number, site in enumerate(self.sites)}
        kinds = (c_char_p * len(self.sites))(*(architecture.kinds[site.kind].tensor.encode() for site in self.sites))
        layers = np.array([site.layer for site in self.sites], np.int32)
        self._check(
            self._lib.steer_new(
                ctypes.byref(self._ggml), width, len(self.sites), kinds, layers.ctypes.data, self.reached.ctypes.data,
                self.turned.ctypes.data, ctypes.byref(self._pointer),
            )
        )  # fmt: skip
        self._record: Record | None = None
        self._readings: tuple[Reading, ...] = ()
        self._filled: Any = ()
        path = os.environ.get("EDGE_STEER_HOOK", "auto")
        if path not in _PATH:
            raise SteerError(f"expected EDGE_STEER_HOOK to be one of {', '.join(_PATH)}, got {path!r}")
        self.path = path

    @property
    def callback(self) -> int:
        """Address of the function for llama.cpp's cb_eval."""
        return ctypes.cast(self._lib.steer_eval, c_void_p).value or 0

    @property
    def user_data(self) -> int:
        """What cb_eval is to be given."""
        return self._pointer.value or 0

    @property
    def path(self) -> str:
        """How it reaches a tensor's memory; another acts from the next decode on."""
        return self._path

    @path.setter
    def path(self, value: str) -> None:
        self._check(self._lib.steer_set_path(self._pointer, _PATH[value]))
        self._path = value

    @property
    def went_inside(self) -> bool:
        """Whether a node of llama.cpp's graph ever was made to turn what it computes."""
        return bool(self._lib.steer_went_inside(self._pointer))

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
        """Record the last rows of every site's tensor into `to` until called with None."""
        self._record = to  # the arrays must live while the hook writes to them
        if to is None:
            self._check(self._lib.steer_set_record(self._pointer, None))
            return
        arrays = (to.sum, to.sum_unit, to.sum_norm, to.count, to.rows)
        addresses = native.RecordAddresses(*(array.ctypes.data for array in arrays), to.rows.shape[1])
        self._check(self._lib.steer_set_record(self._pointer, ctypes.byref(addresses)))

    def read(self, readings: Sequence[Reading]) -> None:
        """Read each row of their sites' tensors until called with ()."""
        if not self._pointer and not readings:  # it is closed: nothing is read
            return
        made = (native.ReadingAddresses * len(readings))(
            *(
                native.ReadingAddresses(
                    self._number[each.site], each.axis.ctypes.data, each.gain, each.offset, each.to.ctypes.data,
                    len(each.to), 0,
                )
                for each in readings
            )
        )  # fmt: skip
        self._check(self._lib.steer_set_readings(self._pointer, len(made), made))
        self._readings, self._filled = tuple(readings), made  # they must live while the hook writes to them

    def read_from(self, at: int) -> None:
        """What the next rows read goes to places from `at` on."""
        for filled in self._filled:
            filled.at = at

    def check_read(self, end: int) -> None:
        """Raise SteerError unless every reading has come as far as place `end`."""
        self.check_status()
        for reading, filled in zip(self._readings, self._filled, strict=True):
            if filled.at != end:
                raise SteerError(
                    f"expected every token's activation at {reading.site}, got {filled.at - end:+d}; "
                    "read at a site before the last block"
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
        if getattr(self, "_pointer", None) and c_void_p is not None:  # None where Python is ending
            self.close()

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise SteerError(f"the native hook {_STATUS.get(status, f'failed ({status})')}")
