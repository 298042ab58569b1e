"""Planes are orthonormal and +θ raises b1·h in them; masks steer where the class means have opposite signs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_steer.calibration.planes import (
    best_direction,
    class_angles,
    discriminative,
    global_plane,
    local_planes,
    orient_plane,
    select_sites,
)
from edge_steer.calibration.sums import ClassSums
from edge_steer.errors import SteerError
from edge_steer.rotation import TurnBy
from edge_steer.sites import Site

D = 16
seeds = st.integers(0, 2**32 - 1)


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


@given(seeds)
def test_the_best_direction_has_the_highest_mean_cosine(seed: int) -> None:
    u = unit(np.random.default_rng(seed).normal(0.5, 1.0, (7, D)))
    assert best_direction(u) == int(np.argmax([np.mean([a @ b for b in u]) for a in u]))


@given(seeds)
def test_a_global_plane_is_orthonormal_and_begins_with_the_best_direction(seed: int) -> None:
    u = unit(np.random.default_rng(seed).normal(0.5, 1.0, (7, D)))
    basis = global_plane(u)
    np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-14)
    np.testing.assert_allclose(basis[0], u[best_direction(u)], atol=1e-14)
    assert np.abs((basis.astype(np.float32) @ basis.astype(np.float32).T) - np.eye(2)).max() < 1e-6


def test_the_second_vector_is_the_planted_principal_component() -> None:
    rng = np.random.default_rng(0)
    axis, across = np.eye(D)[:2]
    along = np.linspace(-1, 1, 9)[:, None]
    u = unit(3 * axis + along * across + 1e-4 * rng.normal(size=(9, D)))
    basis = global_plane(u)
    assert best_direction(u) == 4
    assert basis[0] @ axis > 0.9999
    assert abs(basis[1] @ across) > 0.9999


def test_directions_that_span_no_plane_are_an_error() -> None:
    u = unit(np.ones((1, D)))
    for rows in (u, np.repeat(u, 3, axis=0), np.concatenate([u, -u, u])):
        with pytest.raises(SteerError, match=r"span a plane.*use --plane local"):
            global_plane(rows)


@given(seeds, st.booleans())
def test_a_small_turn_raises_b1_h_at_the_mean(seed: int, flipped: bool) -> None:
    rng = np.random.default_rng(seed)
    basis, mean = global_plane(unit(rng.normal(size=(5, D)))), rng.normal(size=D)
    turned = orient_plane(basis * [[1], [-1 if flipped else 1]], mean)
    assert turned[1] @ mean < 0
    change = (TurnBy(1e-3)(mean, turned) - mean) @ turned[0]
    assert change == pytest.approx(np.deg2rad(1e-3) * abs(turned[1] @ mean), abs=1e-8)
    np.testing.assert_allclose(turned[0], basis[0])


@given(seeds)
def test_a_local_plane_holds_its_direction_and_its_mean_and_turns_the_mean_toward_the_direction(seed: int) -> None:
    rng = np.random.default_rng(seed)
    u, mean = unit(rng.normal(size=(4, D))), 5 * rng.normal(size=(4, D))
    planes, kept = local_planes(u, mean)
    assert kept.tolist() == [0, 1, 2, 3]
    for (b1, b2), direction, mu in zip(planes, u, mean, strict=True):
        np.testing.assert_allclose([b1 @ b1, b2 @ b2, b1 @ b2], [1, 1, 0], atol=1e-14)
        np.testing.assert_allclose(b1, direction, atol=1e-14)
        np.testing.assert_allclose((mu @ b1) * b1 + (mu @ b2) * b2, mu, atol=1e-12)
        assert mu @ b2 < 0


@given(seeds)
def test_a_local_plane_with_a_share_turns_the_mean_toward_the_direction_by_that_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    u, mean = unit(rng.normal(size=(4, D))), 5 * rng.normal(size=(4, D))
    share = np.array([1.0, 0.7, 0.01, 0.0])
    planes, _ = local_planes(u, mean, share)
    for (b1, b2), direction, mu, part in zip(planes, u, mean, share, strict=True):
        np.testing.assert_allclose([b1 @ b1, b2 @ b2, b1 @ b2], [1, 1, 0], atol=1e-14)
        np.testing.assert_allclose(b1, direction, atol=1e-14)
        across = np.linalg.norm(mu - (mu @ b1) * b1)
        assert mu @ b2 == pytest.approx(-part * across, abs=1e-9)


def test_class_angles_are_exact_also_where_they_are_small() -> None:
    angles = np.array([90.0, 12.0, 1e-3, 1e-6, 0.0])
    radians = np.deg2rad(angles)
    along, across = np.eye(3)[:2]
    one = 3 * np.repeat(along[None], 5, axis=0)
    other = 2 * (np.cos(radians)[:, None] * along + np.sin(radians)[:, None] * across)
    found = class_angles(ClassSums.of(one[None]), ClassSums.of(other[None]))
    np.testing.assert_allclose(found, angles, rtol=1e-6, atol=1e-12)


def test_a_site_whose_mean_is_parallel_to_its_direction_has_no_local_plane() -> None:
    u = np.eye(D)[:3]
    mean = np.array([u[0] + u[1], -2 * u[1], 0 * u[2]])
    planes, kept = local_planes(u, mean)
    assert kept.tolist() == [0]
    assert planes.shape == (1, 2, D)
    with pytest.raises(SteerError, match="a plane of its own"):
        local_planes(u[1:], mean[1:])


def sums(along: list[float]) -> ClassSums:
    """One prompt whose h/‖h‖ has these components along the first axis, one per site."""
    rows = np.array([[a, np.sqrt(1 - a * a), 0.0] for a in along])
    return ClassSums.of(7 * rows[None])


def test_a_site_is_discriminative_where_the_class_means_have_opposite_signs() -> None:
    b1 = np.eye(3)[0]
    found = discriminative(sums([0.1, 0.1, -0.1, 0.0, -0.2]), sums([-0.1, 0.2, 0.1, 0.1, -0.1]), b1)
    assert found.tolist() == [True, False, True, False, False]
    assert discriminative(sums([0.5]), sums([-0.5]), b1[None]).tolist() == [True]


def test_every_prompt_counts_the_same_whatever_its_norm() -> None:
    positive = ClassSums.of(np.array([[[-100.0, 0.0]], [[1.0, 0.1]], [[1.0, 0.1]]]))
    negative = ClassSums.of(np.array([[[-1.0, 0.0]]]))
    assert positive.mean[0, 0] < 0
    assert discriminative(positive, negative, np.array([1.0, 0.0])).tolist() == [True]


RECORDED = [Site(layer, kind) for layer in range(3) for kind in ("attn_norm", "ffn_norm")]


def test_masks_by_site_by_layer_and_all() -> None:
    yes = np.array([True, False, True, True, False, False])
    assert select_sites("site", yes, RECORDED, RECORDED).tolist() == yes.tolist()
    assert select_sites("layer", yes, RECORDED, RECORDED).tolist() == [False, False, True, True, False, False]
    assert select_sites("all", yes, RECORDED, RECORDED).all()


def test_a_layer_with_a_site_that_was_left_out_is_not_steered() -> None:
    yes = np.array([True, True, True])
    assert select_sites("layer", yes, RECORDED[1:4], RECORDED).tolist() == [False, True, True]


def test_an_empty_mask_is_an_error_that_names_the_mask_to_use() -> None:
    none = np.zeros(6, np.bool_)
    with pytest.raises(SteerError, match="got none; use --mask all"):
        select_sites("site", none, RECORDED, RECORDED)
    with pytest.raises(SteerError, match="got none; use --mask all"):
        select_sites("layer", none, RECORDED, RECORDED)
    halves = np.array([True, False] * 3)
    with pytest.raises(SteerError, match="got none; use --mask site"):
        select_sites("layer", halves, RECORDED, RECORDED)
