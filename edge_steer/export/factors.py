"""Several linear steerings at one site as one low-rank factor: R = Rₙ…R₁ = I + SᵀGS, exactly.

Letters: d model width, r the sum of the steerings' ranks (2 for a rotation, 1 for an ablation). S (r, d) stacks their
bases and does not depend on the dials; G (r, r) does, and is all that a change of dial changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.rotation import Ablate, Action, TurnBy, rotation_factors
from edge_steer.sites import Site
from edge_steer.steering import RANK, Steering

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Factor:
    """R − I = spanᵀ core span. span: (r, d), core: (r, r), both float64."""

    span: Floats
    core: Floats

    def turn(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weights W R from the weights W, rows (…, d) that read the site: W + (W Sᵀ)(G S). float32."""
        turned: NDArray[np.float32] = (rows @ self.span.T.astype(np.float32)) @ (self.core @ self.span).astype(
            np.float32
        )
        turned += rows
        return turned


def action_core(action: Action | None, rank: int) -> Floats:
    """K (rank, rank) with R = I + BᵀKB for what one steering does; zero where it is off."""
    match action:
        case None:
            return np.zeros((rank, rank))
        case TurnBy(degrees):
            return rotation_factors(degrees)
        case Ablate():
            return np.array([[-1.0]])
        case _:
            raise SteerError(f"expected a linear operator, got {type(action).__name__}; use the hook")


def factor_at(site: Site, steerings: Sequence[Steering], actions: Sequence[Action | None]) -> Factor:
    """The factor of all of `steerings` that act at `site`, one after another in the order given.

    One that is off keeps its place in S, so that S and r are the same at all dials.
    """
    width = steerings[0].basis.shape[2]
    span, core = np.zeros((0, width)), np.zeros((0, 0))
    for steering, action in zip(steerings, actions, strict=True):
        if site not in steering.steered:
            continue
        rank = RANK[steering.operator]
        basis = steering.basis_at(site).astype(np.float64)
        # (I + BᵀKB)(I + SᵀGS) = I + SᵀGS + BᵀK(B + (B Sᵀ) G S)
        row = action_core(action, rank) @ np.hstack([(basis @ span.T) @ core, np.eye(rank)])
        core = np.vstack([np.hstack([core, np.zeros((len(core), rank))]), row])
        span = np.vstack([span, basis])
    return Factor(span, core)
