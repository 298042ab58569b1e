"""The mathematics of steering has the properties that the method promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_steer.rotation import Ablate, Action, Add, TurnBy, TurnTo, cos_sin, orthonormal, rotation_factors

D = 12
degrees = st.floats(-720, 720)
seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int, n: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Activations (n, D) and a basis (2, D), float64."""
    rng = np.random.default_rng(seed)
    return 10 * rng.normal(size=(n, D)), orthonormal(*rng.normal(size=(2, D)))


def dense(basis: np.ndarray, angle: float) -> np.ndarray:
    """R(θ) as a matrix, straight from its definition."""
    b1, b2 = basis
    theta = np.deg2rad(angle)
    p = np.outer(b1, b1) + np.outer(b2, b2)
    j = np.outer(b2, b1) - np.outer(b1, b2)
    return np.asarray(np.eye(D) + (np.cos(theta) - 1) * p + np.sin(theta) * j)


def angle_of(h: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return np.asarray(np.rad2deg(np.arctan2(h @ basis[1], h @ basis[0])))


@given(seeds, degrees)
def test_turning_by_is_the_dense_matrix(seed: int, angle: float) -> None:
    h, basis = drawn(seed)
    np.testing.assert_allclose(TurnBy(angle)(h, basis), h @ dense(basis, angle).T, atol=1e-11)


@given(seeds, degrees, st.floats(-5, 5))
def test_every_turn_keeps_the_norm(seed: int, angle: float, threshold: float) -> None:
    h, basis = drawn(seed)
    for turn in (TurnBy(angle), TurnTo(angle), TurnTo(angle, threshold)):
        np.testing.assert_allclose(np.linalg.norm(turn(h, basis), axis=1), np.linalg.norm(h, axis=1), rtol=1e-12)


@given(seeds, degrees)
def test_a_turn_keeps_the_norm_in_float32(seed: int, angle: float) -> None:
    h, basis = drawn(seed)
    h, basis = h.astype(np.float32), basis.astype(np.float32)
    turned = TurnBy(angle)(h, basis)
    assert turned.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(h, axis=1), rtol=1e-5)


@given(seeds, degrees, degrees)
def test_two_turns_are_one_by_the_sum_of_their_angles(seed: int, a: float, b: float) -> None:
    h, basis = drawn(seed)
    np.testing.assert_allclose(TurnBy(a)(TurnBy(b)(h, basis), basis), TurnBy(a + b)(h, basis), atol=1e-10)


@pytest.mark.parametrize("angle", [0.0, 360.0, -360.0, 720.0])
def test_a_whole_turn_is_the_identity_exactly(angle: float) -> None:
    h, basis = drawn(0)
    assert np.array_equal(TurnBy(angle)(h, basis), h)
    assert not rotation_factors(angle).any()


def test_quarter_turns_are_exact() -> None:
    assert [cos_sin(a) for a in (0, 90, 180, 270, -90)] == [(1, 0), (0, 1), (-1, 0), (0, -1), (0, -1)]
    assert cos_sin(60)[0] == pytest.approx(0.5)


@given(seeds, degrees)
def test_what_is_outside_the_plane_is_untouched(seed: int, angle: float) -> None:
    h, basis = drawn(seed)
    outside = h - h @ basis.T @ basis
    actions: list[Action] = [TurnBy(angle), TurnTo(angle), TurnTo(angle, 0.0), Ablate(), Add(angle)]
    for action in actions:
        turned = action(h, basis)
        np.testing.assert_allclose(turned - turned @ basis.T @ basis, outside, atol=1e-10)


@given(seeds, degrees, st.floats(-3, 3), st.floats(-3, 3))
def test_turning_by_and_ablation_are_linear(seed: int, angle: float, x: float, y: float) -> None:
    h, basis = drawn(seed)
    g, _ = drawn(seed + 1)
    for action in (TurnBy(angle), Ablate()):
        combined = action(x * h + y * g, basis)
        np.testing.assert_allclose(combined, x * action(h, basis) + y * action(g, basis), atol=1e-10)


@given(seeds, st.floats(-179, 179))
def test_turning_by_adds_to_the_angle_and_turning_to_lands_on_it(seed: int, angle: float) -> None:
    h, basis = drawn(seed)
    np.testing.assert_allclose(angle_of(TurnTo(angle)(h, basis), basis), angle, atol=1e-9)
    moved = angle_of(TurnBy(angle)(h, basis), basis) - angle_of(h, basis)
    np.testing.assert_allclose((moved - angle + 180) % 360, 180, atol=1e-6)


@given(seeds, degrees)
def test_turning_to_an_angle_twice_is_turning_once(seed: int, angle: float) -> None:
    h, basis = drawn(seed)
    once = TurnTo(angle)(h, basis)
    np.testing.assert_allclose(TurnTo(angle)(once, basis), once, atol=1e-10)


@given(seeds, degrees)
def test_adaptive_turns_only_rows_above_the_threshold(seed: int, angle: float) -> None:
    h, basis = drawn(seed, n=20)
    above = h @ basis[0] > 1.5
    turned = TurnTo(angle, 1.5)(h, basis)
    assert np.array_equal(turned[~above], h[~above])
    assert np.array_equal(turned[above], TurnTo(angle)(h, basis)[above])


@given(seeds)
def test_ablation_leaves_nothing_along_b1(seed: int) -> None:
    h, basis = drawn(seed)
    np.testing.assert_allclose(Ablate()(h, basis[:1]) @ basis[0], 0, atol=1e-12)


@given(seeds, st.floats(-4, 4), st.floats(0, 100))
def test_addition_moves_along_b1_by_alpha_mean_norms(seed: int, alpha: float, mean_norm: float) -> None:
    h, basis = drawn(seed)
    moved = Add(alpha)(h, basis[:1], mean_norm) - h
    np.testing.assert_allclose(moved, np.tile(alpha * mean_norm * basis[0], (len(h), 1)), atol=1e-9)


@given(seeds)
def test_a_small_turn_changes_b1_h_by_minus_theta_b2_h(seed: int) -> None:
    h, basis = drawn(seed)
    change = (TurnBy(1e-4)(h, basis) - h) @ basis[0]
    np.testing.assert_allclose(change, -np.deg2rad(1e-4) * (h @ basis[1]), atol=1e-9)


@given(seeds, st.floats(1e-12, 1e12))
def test_orthonormal_is_orthonormal_and_keeps_the_first_direction(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    b1, b2 = rng.normal(size=(2, D))
    basis = orthonormal(scale * b1, b2 + 1000 * b1)
    np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(basis[0], b1 / np.linalg.norm(b1), atol=1e-12)
    assert basis[1] @ b2 > 0


def test_no_plane_from_parallel_or_missing_vectors() -> None:
    b = np.arange(1.0, D + 1)
    for b1, b2 in ((b, 3 * b), (b, -b), (b, 0 * b), (0 * b, b)):
        with pytest.raises(ValueError, match="a plane needs two vectors"):
            orthonormal(b1, b2)


def test_one_row_alone_is_turned_like_a_row_among_others() -> None:
    h, basis = drawn(3)
    actions: list[Action] = [TurnBy(33.0), TurnTo(33.0), TurnTo(33.0, 0.0), Ablate(), Add(0.5)]
    for action in actions:
        np.testing.assert_allclose(action(h[0], basis), action(h, basis)[0], atol=1e-12)


@pytest.mark.parametrize("degrees", [1e6 + 1, -1e9 - 0.5, 1e15])
def test_an_angle_of_many_turns_is_its_rest(degrees: float) -> None:
    assert cos_sin(degrees) == pytest.approx(cos_sin(float(np.fmod(degrees, 360))), abs=1e-15)
