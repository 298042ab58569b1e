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


@dataclass(frozen=True)
class Stack:
    """The steerings that act at one site. members: (number of the steering, its rank), in order.

    span: S (r, d) float64. overlap: S Sᵀ (r, r).
    """

    members: tuple[tuple[int, int], ...]
    span: Floats
    overlap: Floats

    def core(self, actions: Sequence[Action | None]) -> Floats:
        """G (r, r) for what each steering does, one after another; one that is off keeps its place, with zeros."""
        core = np.zeros_like(self.overlap)
        at = 0
        for number, rank in self.members:
            own = slice(at, at + rank)
            k = action_core(actions[number], rank)
            # (I + BᵀKB)(I + SᵀGS) = I + SᵀGS + BᵀK(B + (B Sᵀ) G S)
            core[own, :at] = k @ self.overlap[own, :at] @ core[:at, :at]
            core[own, own] = k
            at += rank
        return core


def stack_at(site: Site, steerings: Sequence[Steering]) -> Stack:
    """The stack of those among `steerings` that act at `site`."""
    acting = [(number, each) for number, each in enumerate(steerings) if site in each.steered]
    span = np.concatenate([each.basis_at(site).astype(np.float64) for _, each in acting])
    return Stack(tuple((number, RANK[each.operator]) for number, each in acting), span, span @ span.T)


def factor_at(site: Site, steerings: Sequence[Steering], actions: Sequence[Action | None]) -> Factor:
    """The factor of all of `steerings` that act at `site`, one after another in the order given."""
    stack = stack_at(site, steerings)
    return Factor(stack.span, stack.core(actions))
