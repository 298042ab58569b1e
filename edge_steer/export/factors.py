"""Several linear steerings one after another as one low-rank factor, exactly.

Letters: d model width, r rank. S (r, d) stacks the bases that turn and does not depend on the dials; G (r, r) does, and
is all that a change of dial changes: Rₙ…R₁ = I + SᵀGS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.rotation import Ablate, Action, TurnBy, rotation_factors
from edge_steer.sites import Site
from edge_steer.steering import Steering

Floats = NDArray[np.float64]
Actions = Sequence[Action | None]


@dataclass(frozen=True)
class Factor:
    """M = diag(scale) + leftᵀ core right. left, right: (r, d), core: (r, r), scale: (d,), None for ones; float64."""

    left: Floats
    core: Floats
    right: Floats
    scale: Floats | None = None

    def turn(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """W M from the weights W, rows (…, d): (W leftᵀ)(core right) + W diag(scale). float32."""
        low_rank = (self.core @ self.right).astype(np.float32)
        turned: NDArray[np.float32] = (rows @ self.left.T.astype(np.float32)) @ low_rank
        turned += rows if self.scale is None else rows * self.scale.astype(np.float32)
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
    """Turns that follow one another. members: of each the steering's number and its rows of the span, in order.

    span: S (r, d) float64, every plane once however often it turns. overlap: S Sᵀ (r, r).
    """

    members: tuple[tuple[int, tuple[int, ...]], ...]
    span: Floats
    overlap: Floats

    def core(self, actions: Actions) -> Floats:
        """G (r, r) for what each steering does, one after another; one that is off keeps its place, with zeros."""
        core = np.zeros_like(self.overlap)
        for number, rows in self.members:
            own = list(rows)
            # B = ES: (I + BᵀKB)(I + SᵀGS) = I + Sᵀ(G + EᵀK(E + E S Sᵀ G))S
            after = self.overlap[own] @ core
            after[range(len(own)), own] += 1
            core[own] += action_core(actions[number], len(own)) @ after
        return core


def stack_of(turns: Sequence[tuple[int, NDArray[np.float32]]]) -> Stack:
    """The stack of turns in order, each a steering's number and its basis (rank, d)."""
    rows: dict[bytes, int] = {}
    members = []
    span: list[NDArray[np.float32]] = []
    for number, basis in turns:
        key = basis.tobytes()
        if key not in rows:
            rows[key] = sum(map(len, span))
            span.append(basis)
        members.append((number, tuple(range(rows[key], rows[key] + len(basis)))))
    stacked = np.concatenate(span).astype(np.float64)
    return Stack(tuple(members), stacked, stacked @ stacked.T)


def stack_at(site: Site, steerings: Sequence[Steering]) -> Stack:
    """The stack of those among `steerings` that act at `site`."""
    return stack_of([(number, each.basis_at(site)) for number, each in enumerate(steerings) if site in each.steered])
