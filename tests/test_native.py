"""The native library against rotation.py."""

from __future__ import annotations

import numpy as np
import pytest
from planted import DIAL, random_steering

from edge_steer.architectures import architecture
from edge_steer.choices import OPERATORS, Operator
from edge_steer.errors import SteerError
from edge_steer.provenance import BaseModel
from edge_steer.rotation import TurnBy
from edge_steer.runtime.hook import Hook
from edge_steer.sites import Site
from edge_steer.steering import Steering

WIDTH = 96
SITES = (Site(0, "attn_norm"), Site(0, "ffn_norm"), Site(1, "attn_norm"))
BASE = BaseModel("llama", "none", 2, WIDTH)


def hook_of(*steerings: Steering) -> Hook:
    hook = Hook(architecture("llama"), SITES, WIDTH)
    for steering in steerings:
        hook.add(steering)
    return hook


def activations(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, WIDTH)) * rng.lognormal(0, 2, (n, 1))).astype(np.float32)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shared", [False, True], ids=["a plane each", "one plane"])
def test_every_operator_equals_the_reference(operator: Operator, shared: bool) -> None:
    steering = random_steering(BASE, SITES, operator, shared_plane=shared)
    hook = hook_of(steering)
    h = activations(200)
    for dial in (DIAL[operator], -DIAL[operator] / 3):
        action = steering.action(dial)
        assert action is not None
        hook.dial(0, action)
        for site in SITES:
            expected = action(h.astype(np.float64), steering.basis_at(site).astype(np.float64), 8.0)
            error = np.abs(hook.rows(site, h) - expected).max(axis=1) / np.linalg.norm(h, axis=1)
            assert error.max() < 2e-6


def test_selective_keeps_a_million_norms_and_leaves_what_is_outside_the_plane() -> None:
    steering = random_steering(BASE, SITES[:1])
    hook = hook_of(steering)
    basis = steering.basis[0].astype(np.float64)
    worst_norm = worst_outside = 0.0
    for i, angle in enumerate(np.linspace(0, 360, 50)):
        hook.dial(0, TurnBy(float(angle)))
        h = activations(20_000, seed=i)
        turned = hook.rows(SITES[0], h).astype(np.float64)
        wide = h.astype(np.float64)
        norm = np.linalg.norm(wide, axis=1)
        worst_norm = max(worst_norm, np.abs(np.linalg.norm(turned, axis=1) / norm - 1).max())
        outside = (turned - turned @ basis.T @ basis) - (wide - wide @ basis.T @ basis)
        worst_outside = max(worst_outside, (np.linalg.norm(outside, axis=1) / norm).max())
    assert worst_norm <= 1e-5
    assert worst_outside <= 1e-6


def test_two_turns_are_one_turn_by_the_sum() -> None:
    hook = hook_of(random_steering(BASE, SITES[:1]))
    h = activations(500)
    norm = np.linalg.norm(h, axis=1, keepdims=True)

    def turned(x: np.ndarray, degrees: float) -> np.ndarray:
        hook.dial(0, TurnBy(degrees))
        return hook.rows(SITES[0], x)

    for a, b in ((10, 25), (-40, 130), (200, 300), (7, -7)):
        assert (np.abs(turned(turned(h, a), b) - turned(h, a + b)) / norm).max() < 2e-6
    assert (np.abs(turned(h, 360) - h) / norm).max() == 0


def test_small_angles_are_not_lost() -> None:
    steering = random_steering(BASE, SITES[:1])
    hook = hook_of(steering)
    hook.dial(0, TurnBy(0.001))
    h = activations(100)
    p = h.astype(np.float64) @ steering.basis[0].astype(np.float64).T
    moved = (hook.rows(SITES[0], h).astype(np.float64) - h) @ steering.basis[0].astype(np.float64).T
    expected = np.deg2rad(0.001) * np.stack([-p[:, 1], p[:, 0]], axis=1)
    assert np.abs(moved - expected).max() < 2e-6 * np.abs(h).max()


def test_several_steerings_apply_in_the_order_given_and_off_ones_do_nothing() -> None:
    operators: tuple[Operator, ...] = ("selective", "ablation", "standard", "addition")
    steerings = [random_steering(BASE, SITES, op, seed=i, name=op) for i, op in enumerate(operators)]
    hook = hook_of(*steerings)
    h = activations(50)
    site = SITES[1]
    assert (hook.rows(site, h) == h).all()
    expected = h.astype(np.float64)
    for number, steering in enumerate(steerings):
        action = steering.action(DIAL[steering.operator])
        assert action is not None
        hook.dial(number, action)
        expected = action(expected, steering.basis_at(site).astype(np.float64), 8.0)
        np.testing.assert_allclose(hook.rows(site, h), expected, atol=2e-6 * np.abs(h).max())
    for number in range(len(steerings)):
        hook.dial(number, None)
    assert (hook.rows(site, h) == h).all()


def test_a_site_that_is_masked_out_is_left_alone() -> None:
    steering = random_steering(BASE, SITES).with_(mask=np.array([True, False, True]))
    hook = hook_of(steering)
    hook.dial(0, TurnBy(90))
    h = activations(5)
    assert (hook.rows(SITES[1], h) == h).all()
    assert (hook.rows(SITES[2], h) != h).any()


def test_zero_rows_and_zero_activations_are_legal() -> None:
    hook = hook_of(random_steering(BASE, SITES))
    hook.dial(0, TurnBy(45))
    assert hook.rows(SITES[0], np.empty((0, WIDTH), np.float32)).shape == (0, WIDTH)
    assert (hook.rows(SITES[0], np.zeros((3, WIDTH), np.float32)) == 0).all()


def test_a_dial_that_is_not_finite_is_refused() -> None:
    hook = hook_of(random_steering(BASE, SITES))
    for degrees in (float("nan"), float("inf"), 1e39):  # the last is infinite as a float
        with pytest.raises(SteerError, match="bad argument"):
            hook._check(hook._lib.steer_dial(hook._pointer, 0, (__import__("ctypes").c_double * 3)(degrees, 0, 0)))


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_STEER_HOOK", "bus")
    with pytest.raises(SteerError, match="EDGE_STEER_HOOK"):
        hook_of()
