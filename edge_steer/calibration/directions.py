"""From the sums of two classes to a unit direction per site.

Letters: S sites recorded, T of them with a direction, d model width. Source: arXiv 2601.19375 (difference of means).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_steer.calibration.sums import ClassSums, Float64
from edge_steer.errors import SteerError
from edge_steer.sites import Site
from edge_steer.steering import Steering

# Below this share of the activation a difference is rounding of float32, not a direction.
SMALLEST = 1e-6
# Below this what is left of a unit direction is noise.
_PARALLEL = 1e-3


@dataclass(frozen=True, eq=False)
class Directions:
    """kept: (T,) which of the S sites have a direction, in order. unit: (T, d) float64, u = v/‖v‖ at each."""

    kept: NDArray[np.intp]
    unit: Float64


def compute_directions(sites: Sequence[Site], positive: ClassSums, negative: ClassSums) -> Directions:
    """u_s = v_s/‖v_s‖ with v_s = mean₊ − mean₋, at every one of the S `sites` that has such a direction.

    A site whose ‖v_s‖ is at most 1e-6 of the norm of the mean activation has none: with a chat template every prompt
    ends in the same tokens, so the first norm sees the same activation always. Raises SteerError for a class without
    prompts, for activations that are not finite, and where no site has a direction.
    """
    for name, sums in (("positive", positive), ("negative", negative)):
        if sums.count < 1:
            raise SteerError(f"expected at least one {name} prompt, got none")
        bad = ~np.isfinite(sums.h).all(-1)
        if bad.any():
            raise SteerError(
                f"expected finite activations, got NaN or infinity at {sites[int(bad.argmax())]}; "
                "calibrate with float32 activations"
            )
    v = positive.mean - negative.mean
    length = np.linalg.norm(v, axis=-1)
    mean = np.linalg.norm(positive.mean + negative.mean, axis=-1) / 2
    kept = np.flatnonzero(length > SMALLEST * mean)
    if not len(kept):
        raise SteerError(
            "expected the two classes to differ somewhere, got equal mean activations at every site; use other prompts"
        )
    return Directions(kept, v[kept] / length[kept, None])


def axes_at(sites: Sequence[Site], steering: Steering) -> Float64:
    """b1 (T, d) of `steering` at each of `sites`. Raises SteerError if it was not calibrated at one of them."""
    if missing := [site for site in sites if site not in steering.sites]:
        raise SteerError(
            f"expected steering {steering.name!r} at {missing[0]} to be orthogonal to it there, got "
            f"{', '.join(sorted({site.kind for site in steering.sites}))} sites; calibrate it with the same --sites"
        )
    return np.stack([steering.basis_at(site)[0] for site in sites]).astype(np.float64)


def project_out(unit: Float64, axes: Sequence[Float64]) -> tuple[Float64, NDArray[np.intp]]:
    """The directions (T, d) with their part along each of `axes` (T, d) taken out, unit again, and which T sites keep
    one: u ← unit(u − (u·r)r), the axes made orthogonal to each other first. An axis of zeros takes nothing out.

    Raises SteerError if no site keeps a direction.
    """
    orthogonal: list[Float64] = []
    for axis in axes:
        for earlier in orthogonal:
            axis = axis - (axis * earlier).sum(-1, keepdims=True) * earlier
        length = np.linalg.norm(axis, axis=-1, keepdims=True)
        orthogonal.append(np.divide(axis, length, out=np.zeros_like(axis), where=length > SMALLEST))
    left = unit
    for axis in orthogonal:
        left = left - (left * axis).sum(-1, keepdims=True) * axis
    length = np.linalg.norm(left, axis=-1)
    kept = np.flatnonzero(length > _PARALLEL)
    if not len(kept):
        raise SteerError("expected directions of their own, got ones along those to be orthogonal to; leave those out")
    return left[kept] / length[kept, None], kept


def sink_axis(positive: ClassSums, negative: ClassSums) -> Float64 | None:
    """(T, d) the unit direction of a prompt's first token at each site; None where it was not recorded.

    Models park attention on that token: its activation is massive and points the same way whatever the token is
    (arXiv 2309.17453, 2402.17762).
    """
    if not (positive.sink.ndim and negative.sink.ndim):
        return None
    sink = positive.sink + negative.sink
    length = np.linalg.norm(sink, axis=-1, keepdims=True)
    return np.asarray(np.divide(sink, length, out=np.zeros_like(sink), where=length > 0))
