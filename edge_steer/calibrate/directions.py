"""From the sums of two classes to a unit direction per site.

Letters: S sites recorded, T of them with a direction, d model width. Source: arXiv 2601.19375 (difference of means).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_steer.calibrate.sums import ClassSums, Float64
from edge_steer.errors import SteerError
from edge_steer.sites import Site

# Below this share of the activation a difference is rounding of float32, not a direction.
SMALLEST = 1e-6


@dataclass(frozen=True, eq=False)
class Directions:
    """kept: (T,) which of the S sites have a direction, in order. unit: (T, d) float64, u = v/‖v‖ at each."""

    kept: NDArray[np.intp]
    unit: Float64


def directions(sites: Sequence[Site], positive: ClassSums, negative: ClassSums) -> Directions:
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
