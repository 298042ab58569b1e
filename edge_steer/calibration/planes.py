"""From directions to the planes in which activations are turned, and to the mask of sites where they are.

Letters: T sites with a direction u, d model width. Everything is float64; the cast to float32 comes last.
R(θ) changes b1·h by −θ·(b2·h) at small θ: hence the signs of b2.
Source of the global plane and of the mask: arXiv 2601.19375. The local planes are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_steer.calibration.sums import ClassSums, Float64
from edge_steer.choices import Mask
from edge_steer.errors import SteerError
from edge_steer.rotation import orthonormal
from edge_steer.sites import Site

SHARED_DEPTH = 0.7


def best_direction(unit: Float64) -> int:
    """Which of the directions (T, d) has the highest mean cosine similarity to all of them."""
    # Dot products are linear: the mean cosine with all u is the dot product with the mean of all u.
    return int(np.argmax(unit @ unit.mean(0)))


def global_plane(unit: Float64) -> Float64:
    """B (2, d) from the directions (T, d): b1 the best of them, b2 their first principal component orthogonal to b1.

    The sign of b2 is left open, see `orient_plane`. Raises SteerError if all directions are one.
    """
    b1 = unit[best_direction(unit)]
    _, spread, components = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    try:
        if spread[0] < 1e-9:
            raise ValueError("the directions are all the same")
        return orthonormal(b1, components[0])
    except ValueError as error:
        raise SteerError(
            f"expected directions that span a plane, got {len(unit)} that do not ({error}); use --plane local"
        ) from None


def reference_site(sites: Sequence[Site], block_count: int) -> int:
    """Which of `sites` gives its plane to all, where they share one: that nearest to SHARED_DEPTH of the depth."""
    return int(np.argmin([abs(site.layer - SHARED_DEPTH * block_count) for site in sites]))


def orient_plane(basis: Float64, mean: Float64) -> Float64:
    """B (2, d) with the sign of b2 with which a small +θ raises b1·h at the activation `mean` (d,)."""
    return np.asarray(basis * [[1.0], [1.0 if basis[1] @ mean <= 0 else -1.0]])


def class_angles(positive: ClassSums, negative: ClassSums) -> Float64:
    """(T,) degrees between the class means at each site: how far the model itself turns an activation there."""
    one, other = positive.mean, negative.mean
    # From the chord between unit vectors: an arc cosine has no small angles.
    chord = np.linalg.norm(_unit(one) - _unit(other), axis=-1)
    return np.asarray(np.rad2deg(2 * np.arcsin(np.minimum(chord / 2, 1))))


def local_planes(unit: Float64, mean: Float64, share: Float64 | None = None) -> tuple[Float64, NDArray[np.intp]]:
    """A plane (2, d) for each site from its direction (T, d) and its mean activation (T, d): b1 = u and
    b2 = −unit(m), m = μ − (μ·b1)b1, so that a small +θ raises b1·h, at the mean by θ‖m‖.

    share (T,) in 0…1: raise it by share·θ‖m‖ only. The dial is one angle for all sites, which is what lets one pair of
    adapters serve every angle; so b2 leans away from the mean, toward a direction n in which activations have
    no part but chance: b2 = −(share·unit(m) + √(1 − share²)·n).

    Returns the planes (T′, 2, d) and which T′ sites have one: where μ is parallel to b1, there is none.
    """
    planes = []
    kept = []
    chance = np.random.default_rng((2601, 19375)).standard_normal(unit.shape)
    for number, (u, mu) in enumerate(zip(unit, mean, strict=True)):
        try:
            plane = orthonormal(u, -mu)
            if share is not None:
                across = orthonormal(plane[1], chance[number] - (chance[number] @ plane[0]) * plane[0])[1]
                plane = orthonormal(u, share[number] * plane[1] + np.sqrt(1 - share[number] ** 2) * across)
        except ValueError:
            continue
        planes.append(plane)
        kept.append(number)
    if not planes:
        raise SteerError("expected a site with a plane of its own, got none: every mean is parallel to its direction")
    return np.stack(planes), np.array(kept, np.intp)


def _unit(rows: Float64) -> Float64:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def discriminative(positive: ClassSums, negative: ClassSums, b1: Float64) -> NDArray[np.bool_]:
    """(T,) where the class means of (h/‖h‖)·b1 have opposite signs. b1: (T, d), or (d,) for all sites."""
    return np.asarray((positive.mean_unit * b1).sum(-1) * (negative.mean_unit * b1).sum(-1) < 0)


def select_sites(
    mask: Mask, discriminative: NDArray[np.bool_], sites: Sequence[Site], recorded: Sequence[Site]
) -> NDArray[np.bool_]:
    """(T,) which of the T `sites` are steered.

    `site`: those that are discriminative. `layer`: those in layers whose `recorded` sites all are (one without a
    direction is not). `all`: all. Raises SteerError, naming the mask to use instead, where none would be.
    """
    if mask == "all":
        return np.ones(len(sites), np.bool_)
    if not discriminative.any():
        raise SteerError(f"expected a discriminative site for --mask {mask}, got none; use --mask all")
    if mask == "site":
        return discriminative
    wanted = Counter(site.layer for site in recorded)
    found = Counter(site.layer for site, yes in zip(sites, discriminative, strict=True) if yes)
    chosen = np.array([found[site.layer] == wanted[site.layer] for site in sites], np.bool_)
    if not chosen.any():
        raise SteerError(
            "expected a layer whose sites are all discriminative for --mask layer, got none; use --mask site"
        )
    return chosen
