"""What recording keeps of a class of prompts: sums of its activations, never the activations themselves.

Letters: n prompts, S sites, d model width. h: the activation of a prompt's last token at a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_steer.sites import Site
from edge_steer.steering import BaseModel

if TYPE_CHECKING:
    from edge_steer.contrast import Prompt

Float64 = NDArray[np.float64]
# Called with k after every k further prompts.
Step = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class ClassSums:
    """Sums over the `count` prompts of one class: h (S, d) Σh, unit (S, d) Σh/‖h‖, norm (S,) Σ‖h‖, all float64.

    Sums of two halves of a class add up to those of the whole.
    """

    count: int
    h: Float64
    unit: Float64
    norm: Float64

    @classmethod
    def of(cls, rows: NDArray[np.floating[Any]]) -> ClassSums:
        """Sums of the activations `rows` (n, S, d). A row of zeros has no direction and adds nothing to `unit`."""
        h = np.asarray(rows, np.float64)
        norm = np.linalg.norm(h, axis=-1)
        # Infinity is reported where directions are made, with the name of the site.
        with np.errstate(invalid="ignore"):
            unit = np.divide(h, norm[..., None], out=np.zeros_like(h), where=norm[..., None] > 0)
        return cls(len(h), h.sum(0), unit.sum(0), norm.sum(0))

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(self.count + other.count, self.h + other.h, self.unit + other.unit, self.norm + other.norm)

    def at(self, index: NDArray[np.integer[Any]]) -> ClassSums:
        """The sums at the sites `index` only."""
        return ClassSums(self.count, self.h[index], self.unit[index], self.norm[index])

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
        """The sums over `prompts`, in memory O(S·d)."""

    def rows(self, prompts: Sequence[Prompt], step: Step) -> Iterator[NDArray[np.float32]]:
        """The activations (S, d) of each prompt, in the order given."""
