"""Random steerings for exact tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_steer.choices import RANK, Operator
from edge_steer.provenance import BaseModel
from edge_steer.rotation import orthonormal
from edge_steer.sites import Site
from edge_steer.steering import Steering


def random_steering(
    base: BaseModel, sites: Sequence[Site], operator: Operator = "selective", *, seed: int = 0, name: str = "random",
    mean_norm: float = 8.0, shared_plane: bool = False,
) -> Steering:  # fmt: skip
    """A steering in random planes at every one of `sites`."""
    rng = np.random.default_rng(seed)
    count = 1 if shared_plane else len(sites)
    width = base.embedding_length
    basis = np.stack([orthonormal(*rng.standard_normal((2, width))) for _ in range(count)])[:, : RANK[operator]]
    return Steering(
        name=name, operator=operator, plane="global" if shared_plane else "local", sites=tuple(sorted(sites)),
        mask=np.ones(len(sites), np.bool_),
        site_plane=np.zeros(len(sites), np.uint32) if shared_plane else np.arange(len(sites), dtype=np.uint32),
        basis=basis.astype(np.float32), base=base, mean_norm=np.full(len(sites), mean_norm, np.float32),
        threshold=0.0 if operator == "adaptive" else float("nan"),
    )  # fmt: skip


# A dial that visibly acts, for each operator.
DIAL: dict[Operator, float] = {"selective": 30.0, "standard": 70.0, "adaptive": 200.0, "ablation": 1.0, "addition": 0.4}
