"""From activations to sums to directions."""

from __future__ import annotations

import numpy as np
import pytest

from edge_steer.calibration.directions import compute_directions
from edge_steer.calibration.sums import ClassSums
from edge_steer.errors import SteerError
from edge_steer.sites import Site

SITES = tuple(Site(layer, kind) for layer in range(3) for kind in ("attn_norm", "ffn_norm"))
D = 8


def activations(seed: int, n: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).normal(2.0, 3.0, (n, len(SITES), D))


def test_sums_are_what_their_names_say() -> None:
    rows = activations(0)
    sums = ClassSums.of(rows.astype(np.float32))
    rows = rows.astype(np.float32).astype(np.float64)
    norms = np.sqrt((rows**2).sum(-1))
    assert sums.count == 10
    np.testing.assert_allclose(sums.h, rows.sum(0), rtol=1e-12)
    np.testing.assert_allclose(sums.unit, (rows / norms[..., None]).sum(0), rtol=1e-12)
    np.testing.assert_allclose(sums.norm, norms.sum(0), rtol=1e-12)
    np.testing.assert_allclose(sums.mean, rows.mean(0))
    np.testing.assert_allclose(sums.mean_unit, (rows / norms[..., None]).mean(0))
    assert {sums.h.dtype, sums.unit.dtype, sums.norm.dtype} == {np.dtype(np.float64)}


def test_sums_of_two_halves_add_up_to_the_whole() -> None:
    rows = activations(1)
    whole, halves = ClassSums.of(rows), ClassSums.of(rows[:3]) + ClassSums.of(rows[3:])
    assert halves.count == whole.count
    for name in ("h", "unit", "norm"):
        np.testing.assert_allclose(getattr(halves, name), getattr(whole, name), rtol=1e-12)


def test_a_row_of_zeros_poisons_nothing() -> None:
    sums = ClassSums.of(np.zeros((2, len(SITES), D)))
    assert not sums.unit.any()
    assert not sums.norm.any()


def test_a_direction_is_the_unit_difference_of_class_means() -> None:
    a, b = activations(2), activations(3)
    found = compute_directions(SITES, ClassSums.of(a), ClassSums.of(b))
    v = a.mean(0) - b.mean(0)
    assert found.kept.tolist() == list(range(len(SITES)))
    np.testing.assert_allclose(found.unit, v / np.linalg.norm(v, axis=1, keepdims=True), rtol=1e-12)
    assert found.unit.dtype == np.float64


@pytest.mark.parametrize("offset", [0.0, 1e-9])
def test_a_site_where_the_classes_do_not_differ_is_left_out(offset: float) -> None:
    a, b = activations(4), activations(5)
    b[:, 0] = a[:, 0] + offset
    b[:, 3] = a[:, 3] = 0
    found = compute_directions(SITES, ClassSums.of(a), ClassSums.of(b))
    assert found.kept.tolist() == [1, 2, 4, 5]
    assert np.isfinite(found.unit).all()


def test_a_small_true_difference_is_kept() -> None:
    a = np.repeat(activations(6, 1), 2, axis=0)
    b = a + 1e-4 * np.eye(D)[0]
    np.testing.assert_allclose(compute_directions(SITES, ClassSums.of(b), ClassSums.of(a)).unit[:, 0], 1, atol=1e-6)


def test_what_has_no_direction_is_one_clear_line() -> None:
    a, none = ClassSums.of(activations(7)), ClassSums.of(np.zeros((0, len(SITES), D)))
    with pytest.raises(SteerError, match="expected at least one positive prompt, got none"):
        compute_directions(SITES, none, a)
    with pytest.raises(SteerError, match="expected at least one negative prompt, got none"):
        compute_directions(SITES, a, none)
    with pytest.raises(SteerError, match="equal mean activations at every site"):
        compute_directions(SITES, a, a)
    broken = activations(8)
    broken[0, 2, 1] = np.inf
    with pytest.raises(SteerError, match=r"NaN or infinity at blk\.1\.attn_norm"):
        compute_directions(SITES, a, ClassSums.of(broken))
