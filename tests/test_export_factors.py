"""Several linear steerings at one site are one low-rank factor, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import random_steering

from edge_steer.choices import Operator
from edge_steer.errors import SteerError
from edge_steer.export.factors import action_core, stack_at, stack_of
from edge_steer.export.folding import Reads
from edge_steer.provenance import BaseModel
from edge_steer.rotation import Ablate, Add, TurnBy, TurnTo
from edge_steer.sites import Site

BASE = BaseModel("llama", "m", 3, 48)
SITES = [Site(layer, kind) for layer in range(3) for kind in ("attn_norm", "ffn_norm")]
DIALS = st.lists(st.one_of(st.none(), st.floats(-720, 720), st.just("ablation")), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(DIALS, st.integers(0, 99))
def test_the_factor_is_the_operators_one_after_another(dials: list[float | str | None], seed: int) -> None:
    operators: list[Operator] = ["ablation" if dial == "ablation" else "selective" for dial in dials]
    steerings = [random_steering(BASE, SITES, op, seed=seed + i, name=f"s{i}") for i, op in enumerate(operators)]
    actions = [s.action(1.0 if isinstance(d, str) else d) for s, d in zip(steerings, dials, strict=True)]
    h = np.random.default_rng(seed).standard_normal((5, 48))
    expected = h
    for steering, action in zip(steerings, actions, strict=True):
        if action is not None:
            expected = action(expected, steering.basis_at(SITES[1]).astype(np.float64))
    stack = stack_at(SITES[1], steerings)
    assert np.abs(h + h @ stack.span.T @ stack.core(actions).T @ stack.span - expected).max() < 1e-12
    assert len(stack.span) == sum(1 if op == "ablation" else 2 for op in operators)


def test_a_plane_that_turns_several_times_stands_in_the_span_once() -> None:
    one, two = random_steering(BASE, SITES, name="a"), random_steering(BASE, SITES, name="b", seed=1)
    a, b = one.basis_at(SITES[0]), two.basis_at(SITES[0])
    stack = stack_of([(0, a), (1, b), (0, a), (0, a)])
    assert stack.span.shape == (4, 48)
    h = np.random.default_rng(0).standard_normal((5, 48))
    expected = h
    for action, basis in ((TurnBy(9), a), (TurnBy(-4), b), (TurnBy(9), a), (TurnBy(9), a)):
        expected = action(expected, basis.astype(np.float64))
    turned = h + h @ stack.span.T @ stack.core([TurnBy(9), TurnBy(-4)]).T @ stack.span
    assert np.abs(turned - expected).max() < 1e-12


def test_a_weight_turned_then_read_is_the_activation_turned_then_read() -> None:
    steering = random_steering(BASE, SITES)
    rng = np.random.default_rng(1)
    w, h = rng.standard_normal((2, 7, 48)).astype(np.float32), rng.standard_normal((5, 48)).astype(np.float32)
    turned = Reads(stack_at(SITES[0], [steering])).factor([TurnBy(40)]).turn(w)
    action = TurnBy(40)(h.astype(np.float64), steering.basis_at(SITES[0]).astype(np.float64))
    assert np.abs(h @ turned.swapaxes(1, 2) - action @ w.swapaxes(1, 2)).max() < 1e-5


def test_a_steering_that_is_off_keeps_its_place() -> None:
    one, two = random_steering(BASE, SITES, name="a"), random_steering(BASE, SITES, name="b", seed=1)
    stack = stack_at(SITES[0], [one, two])
    assert stack.core([TurnBy(9), TurnBy(5)])[2:].any()
    assert not stack.core([TurnBy(9), None])[2:].any()


@pytest.mark.parametrize("action", [TurnTo(4), Add(1)])
def test_what_is_not_linear_has_no_factor(action: TurnTo | Add) -> None:
    with pytest.raises(SteerError, match="linear"):
        action_core(action, 2)


def test_ablation_is_rank_one() -> None:
    assert action_core(Ablate(), 1).tolist() == [[-1.0]]
