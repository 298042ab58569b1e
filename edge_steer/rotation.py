"""The mathematics of steering, in numpy: the one reference that native code, adapters and baked weights are tested on.

Letters: n tokens, d model width, m outputs of a weight. Angles are degrees here as everywhere outside a formula.
h: (n, d) activations. B: (rank, d) orthonormal rows b1, b2. P = b1b1ᵀ + b2b2ᵀ, J = b2b1ᵀ − b1b2ᵀ.
Source of `selective` and of the operators it is compared with: arXiv 2601.19375.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def cos_sin(degrees: float) -> tuple[float, float]:
    """cos and sin of an angle, exact at whole quarter turns so that R(360) is the identity."""
    quarters, rest = divmod(degrees, 90.0)
    if rest == 0.0:
        return ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[int(quarters) % 4]
    radians = np.deg2rad(math.remainder(degrees, 360.0))  # exact, where radians of a million turns are not
    return float(np.cos(radians)), float(np.sin(radians))


def orthonormal(b1: Array, b2: Array) -> NDArray[np.float64]:
    """B (2, d) float64: b1 normalised, b2 orthogonalised against it (twice, for float precision) and normalised.

    Raises ValueError if the two do not span a plane.
    """
    u = np.asarray(b1, np.float64)
    v = np.asarray(b2, np.float64)
    if not (np.linalg.norm(u) > 0 and np.linalg.norm(v) > 0):
        raise ValueError("a plane needs two vectors that are not zero")
    u = u / np.linalg.norm(u)
    v = v / np.linalg.norm(v)
    w = v - (v @ u) * u
    w = w - (w @ u) * u
    if np.linalg.norm(w) < 1e-9:
        raise ValueError("a plane needs two vectors that are not parallel")
    return np.stack([u, w / np.linalg.norm(w)])


def rotation_factors(degrees: float) -> NDArray[np.float64]:
    """K (2, 2) with R(θ) = I + BᵀKB: the rank-2 form that activations, adapters and weights are turned with."""
    c, s = cos_sin(degrees)
    return np.array([[c - 1, -s], [s, c - 1]])


@dataclass(frozen=True)
class TurnBy:
    """`selective`: R(θ)h = h + (cosθ − 1)Ph + sinθ Jh, turns by θ. Linear, keeps ‖h‖."""

    degrees: float

    def __call__(self, h: Array, basis: Array, mean_norm: float = 1.0) -> Array:
        turned: Array = h + (h @ basis.T) @ rotation_factors(self.degrees).T.astype(h.dtype) @ basis
        return turned


@dataclass(frozen=True)
class TurnTo:
    """`standard`: h − Ph + ‖Ph‖(cosθ b1 + sinθ b2), turns to θ. Keeps ‖h‖, not linear.

    With a threshold, `adaptive`: only rows where h·b1 > threshold.
    """

    degrees: float
    threshold: float | None = None

    def __call__(self, h: Array, basis: Array, mean_norm: float = 1.0) -> Array:
        c, s = cos_sin(self.degrees)
        p = h @ basis.T
        r = np.hypot(p[..., 0], p[..., 1])
        q = np.stack([r * c, r * s], axis=-1) - p
        if self.threshold is not None:
            q = np.where(p[..., :1] > self.threshold, q, 0.0)
        turned: Array = h + q.astype(h.dtype) @ basis
        return turned


@dataclass(frozen=True)
class Ablate:
    """`ablation`: h − (h·b1)b1. Linear, does not keep ‖h‖."""

    def __call__(self, h: Array, basis: Array, mean_norm: float = 1.0) -> Array:
        turned: Array = h - (h @ basis[0])[..., None] * basis[0]
        return turned


@dataclass(frozen=True)
class Add:
    """`addition`: h + α·r·b1, r the site's mean norm. Affine."""

    alpha: float

    def __call__(self, h: Array, basis: Array, mean_norm: float = 1.0) -> Array:
        turned: Array = h + np.asarray(self.alpha * mean_norm, h.dtype) * basis[0]
        return turned


# What one steering does to the activations (n, d) at a site with basis (rank, d) and mean norm r.
Action = TurnBy | TurnTo | Ablate | Add
