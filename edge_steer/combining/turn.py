"""What a steering does at its sites, as something that can be added and projected.

Letters: S sites, K parts, d model width. A steering turns h by θ in the plane of b1 and b2. To first order that adds
θ(b2 b1ᵀ − b1 b2ᵀ)h, so several steerings in turn add G h with G = Σ y_k x_kᵀ − x_k y_kᵀ, where x_k = θ_k b1_k and
y_k = b2_k. The expression's operators act on the x_k; the y_k stay with them. `addition` has x_k = α_k r b1_k and no y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.sites import Site
from edge_steer.steering import Steering

Float64 = NDArray[np.float64]

# A sum shorter than this share of what went into it has cancelled: what is left is rounding, not a direction.
CANCELLED = 1e-3


@dataclass(frozen=True, eq=False)
class Turn:
    """x: (K, S, d), in degrees (`addition`: in lengths of activations). y: (K, S, d) unit, 0 for `addition`.
    size: (S,) how long the sum would be if nothing cancelled."""

    x: Float64
    y: Float64
    size: Float64

    @property
    def sum(self) -> Float64:
        """(S, d) the direction at each site, as long as the turn is large; 0 where it has cancelled."""
        total = self.x.sum(0)
        total[np.linalg.norm(total, axis=-1) <= CANCELLED * self.size] = 0
        return np.asarray(total)

    def scale(self, factor: float) -> Turn:
        return replace(self, x=factor * self.x, size=abs(factor) * self.size)

    def plus(self, other: Turn) -> Turn:
        return Turn(np.concatenate([self.x, other.x]), np.concatenate([self.y, other.y]), self.size + other.size)

    def at(self, sites: NDArray[np.intp]) -> Turn:
        """At these of the sites only."""
        return Turn(self.x[:, sites], self.y[:, sites], self.size[sites])

    def along(self, other: Turn) -> Turn:
        """Its component along the direction of `other`, at each site; 0 where the other has none."""
        r = self._direction(other, "|")
        return replace(self, x=(self.x * r).sum(-1, keepdims=True) * r)

    def without(self, other: Turn) -> Turn:
        """What is left of it where its component along the other is taken out: x − (x·r)r, as `--orthogonal-to`."""
        r = self._direction(other, "~")
        left = self.x - (self.x * r).sum(-1, keepdims=True) * r
        return replace(self, x=left - (left * r).sum(-1, keepdims=True) * r)  # twice, for float precision

    def _direction(self, other: Turn, sign: str) -> Float64:
        r = unit(other.sum)
        if not (self.x.any((0, 2)) & r.any(-1)).any():
            raise SteerError(
                f"expected both sides of {sign} to act at a common site, got none; calibrate both with the same --sites"
            )
        return r

    def apply_generator(self, u: Float64) -> Float64:
        """G u (S, d): where the unit directions u (S, d) go under the parts in turn, to first order, in degrees."""
        return np.asarray(
            (self.y * (self.x * u).sum(-1, keepdims=True) - self.x * (self.y * u).sum(-1, keepdims=True)).sum(0)
        )

    def generator_norm(self) -> Float64:
        """(S,) ‖G‖/√2, Frobenius: the angle of a turn in one plane, the root of the squares' sum in several."""
        xx, yy, xy = (
            np.einsum("ksd,lsd->skl", a, b) for a, b in ((self.x, self.x), (self.y, self.y), (self.x, self.y))
        )
        squared = (xx * yy - xy * xy.transpose(0, 2, 1)).sum((1, 2))
        return np.asarray(np.sqrt(np.maximum(squared, 0)))


def turn_of(steering: Steering, dial: float, sites: Sequence[Site]) -> Turn:
    """The turn that `steering` makes at `dial`, over `sites`; 0 at those that it does not steer."""
    width = steering.basis.shape[2]
    x, y = np.zeros((2, 1, len(sites), width))
    acts = set(steering.steered)
    for number, site in enumerate(sites):
        if site in acts:
            basis = steering.basis_at(site).astype(np.float64)
            length = steering.mean_norm[steering.sites.index(site)] if steering.operator == "addition" else 1.0
            x[0, number] = dial * float(length) * basis[0]
            if len(basis) == 2:
                y[0, number] = basis[1]
    return Turn(x, y, np.linalg.norm(x[0], axis=-1))


def unit(rows: Float64) -> Float64:
    """Rows (…, d) of length 1; a row of zeros stays one."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(np.divide(rows, length, out=np.zeros_like(rows), where=length > 0))
