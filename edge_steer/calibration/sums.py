"""What recording keeps of a class of prompts: sums of its activations, and the first few activations themselves.

Letters: n prompts, k of them kept, S sites, d model width. h: the activation of a prompt's last token at a site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_steer.provenance import BaseModel
from edge_steer.sites import Site

if TYPE_CHECKING:
    from edge_steer.prompts import Prompt

Float64 = NDArray[np.float64]
# Called with k after every k further prompts.
Step = Callable[[int], None]
# Activations kept of a class, to measure how far the classes lie apart: its error is a tenth of a standard deviation.
KEPT = 64


def _none() -> NDArray[np.float32]:
    return np.zeros((0, 0, 0), np.float32)


@dataclass(frozen=True, eq=False)
class ClassSums:
    """Sums over the `count` prompts of one class: h (S, d) Σh, unit (S, d) Σh/‖h‖, norm (S,) Σ‖h‖, all float64.

    rows: (k, S, d) float32, the activations of at most KEPT of the prompts.
    sink: (S, d) float64, the activation of a prompt's first token, the attention sink; 0 where none was recorded.
    Sums of two halves of a class add up to those of the whole.
    """

    count: int
    h: Float64
    unit: Float64
    norm: Float64
    rows: NDArray[np.float32] = field(default_factory=_none)
    sink: Float64 = field(default_factory=lambda: np.zeros(()))

    @classmethod
    def of(cls, rows: NDArray[np.floating[Any]]) -> ClassSums:
        """Sums of the activations `rows` (n, S, d). A row of zeros has no direction and adds nothing to `unit`."""
        h = np.asarray(rows, np.float64)
        norm = np.linalg.norm(h, axis=-1)
        # Infinity is reported where directions are made, with the name of the site.
        with np.errstate(invalid="ignore"):
            unit = np.divide(h, norm[..., None], out=np.zeros_like(h), where=norm[..., None] > 0)
        return cls(len(h), h.sum(0), unit.sum(0), norm.sum(0), np.array(rows[:KEPT], np.float32))

    def __add__(self, other: ClassSums) -> ClassSums:
        kept = np.concatenate([each for each in (self.rows, other.rows) if len(each)] or [self.rows])[:KEPT]
        return ClassSums(
            self.count + other.count, self.h + other.h, self.unit + other.unit, self.norm + other.norm, kept,
            self.sink if self.sink.any() else other.sink,
        )  # fmt: skip

    def at(self, index: NDArray[np.integer[Any]]) -> ClassSums:
        """The sums at the sites `index` only."""
        rows = self.rows[:, index] if len(self.rows) else self.rows
        sink = self.sink[index] if self.sink.ndim else self.sink
        return ClassSums(self.count, self.h[index], self.unit[index], self.norm[index], rows, sink)

    def subtract_mean(self, where: NDArray[np.bool_]) -> ClassSums:
        """Σh and the sink, their mean over the d elements taken off at the sites `where`: what a LayerNorm sees."""
        h, sink = (
            np.where(where[:, None], each - each.mean(-1, keepdims=True), each) if each.ndim else each
            for each in (self.h, self.sink)
        )
        return replace(self, h=h, sink=sink)

    @property
    def mean(self) -> Float64:
        """Mean h, (S, d)."""
        return self.h / self.count

    @property
    def mean_unit(self) -> Float64:
        """Mean h/‖h‖, (S, d): what a mask needs, since (h/‖h‖)·b1 is linear in it."""
        return self.unit / self.count


class Recorder(Protocol):
    """Runs prompts through a model and reads the last token's activation at every site."""

    @property
    def name(self) -> str:
        """`native` or `torch`."""

    @property
    def base(self) -> BaseModel: ...

    @property
    def sites(self) -> tuple[Site, ...]:
        """S sites in network order."""

    def sums(self, prompts: Sequence[Prompt], step: Step) -> ClassSums:
        """The sums over `prompts`, in memory O(S·d) with the KEPT activations."""
