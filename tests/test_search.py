"""Budgets, safe ranges, and where a sweep looks, on made-up curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from edge_steer.choices import Operator
from edge_steer.sweep.budget import Budget, SafeRange, find_largest_effects, find_safe_range
from edge_steer.sweep.point_metrics import PointMetrics
from edge_steer.sweep.search import QUICK_SIZE, PointMeasurer, SweepSize, find_sharpest_bend, search_dials

OFF = PointMetrics(None, gap=0.0, kl=0.0, accuracy=0.9, retention=1.0, confidence_kept=1.0, repetition=0.1)
BUDGET = Budget()


def at(dial: float, **changes: Any) -> PointMetrics:
    found: dict[str, Any] = {"gap": dial / 10, "kl": 0.01, "retention": 1.0, "confidence_kept": 1.0, "repetition": 0.1}
    return PointMetrics(dial, **{**found, **changes})


def test_a_budget_names_each_limit_that_is_broken() -> None:
    assert BUDGET.broken_limits(at(1, kl=0.25, retention=0.97, repetition=0.2), OFF) == []
    assert BUDGET.broken_limits(at(1, kl=0.26), OFF) == ["kl"]
    assert BUDGET.broken_limits(at(1, retention=0.96), OFF) == ["retention"]
    assert BUDGET.broken_limits(at(1, repetition=0.21), OFF) == ["repetition"]
    assert BUDGET.broken_limits(at(1, kl=1.0, retention=0.5, repetition=1.0), OFF) == ["kl", "retention", "repetition"]


def test_what_was_not_measured_breaks_nothing_but_is_not_allowed() -> None:
    partial = PointMetrics(1.0, gap=0.1, kl=0.01)
    assert BUDGET.broken_limits(partial, OFF) == []
    assert not BUDGET.allows(partial, OFF)


def test_a_budget_that_wants_standard_errors_holds_the_mean_and_them_to_the_limit() -> None:
    careful = Budget(errors=2.0)
    assert careful.broken_limits(at(1, kl=0.2, kl_error=0.03), OFF) == ["kl"]
    assert careful.broken_limits(at(1, kl=0.2, kl_error=0.02), OFF) == []
    assert careful.broken_limits(at(1, kl=0.2), OFF) == []
    assert BUDGET.broken_limits(at(1, kl=0.2, kl_error=0.3), OFF) == []
    wary = Budget(repetition_errors=1.0)
    limit = wary.repetition_factor * (OFF.repetition or 0.0) + wary.repetition_slack
    assert wary.broken_limits(at(1, repetition=limit - 0.01, repetition_error=0.02), OFF) == ["repetition"]
    assert wary.broken_limits(at(1, repetition=limit - 0.03, repetition_error=0.02), OFF) == []
    assert BUDGET.broken_limits(at(1, repetition=limit - 0.01, repetition_error=0.02), OFF) == []
    model = Model(lambda dial: at(dial, kl=(dial / 11) ** 2 * 0.25, kl_error=(dial / 11) ** 2 * 0.05), careful)
    search_dials(model.measurer, "selective", SweepSize())
    end = 11 * math.sqrt(0.25 / 0.35)
    assert 0.95 * end < model.range().high <= end


def test_within_the_error_of_the_count_the_confidence_decides() -> None:
    def broken(retention: float, confidence: float) -> bool:
        return bool(
            BUDGET.broken_limits(at(1, retention=retention, retention_error=0.02, confidence_kept=confidence), OFF)
        )

    assert not broken(0.96, 0.99)
    assert broken(0.98, 0.96)
    assert broken(0.94, 0.99)
    assert not broken(1.0, 0.9)


def test_the_safe_range_ends_at_the_first_broken_position_each_way() -> None:
    points = [at(d) for d in (-8.0, -4.0, -2.0, 2.0, 4.0)]
    points += [at(-16, kl=0.5), at(-32), at(8, retention=0.9, kl=0.3), at(16)]
    assert find_safe_range(points, OFF, BUDGET) == SafeRange(-8, 4, "kl", "kl, retention")


def test_a_position_measured_in_part_neither_ends_nor_widens_a_range() -> None:
    points = [at(2), PointMetrics(3.0, gap=0.3, kl=0.1), at(4), PointMetrics(6.0, gap=0.6, kl=0.1)]
    assert find_safe_range(points, OFF, BUDGET) == SafeRange(0, 4, "end", "end")


def test_a_dial_that_breaks_at_once_has_a_range_of_off_alone() -> None:
    found = find_safe_range([at(-2, kl=1), at(2, kl=1)], OFF, BUDGET)
    assert found == SafeRange(0, 0, "kl", "kl")
    assert find_largest_effects([at(-2, kl=1), at(2, kl=1)], OFF, BUDGET, found) == (OFF, OFF)


def test_a_range_around_a_centre_that_breaks_is_none() -> None:
    assert find_safe_range([at(90, kl=1), at(120)], OFF, BUDGET, centre=90.0) is None


def test_the_best_positions_may_lie_inside_the_range_and_on_either_side() -> None:
    points = [at(-4, gap=-0.2), at(-2, gap=-0.5), at(2, gap=-0.1), at(4, gap=0.3), at(8, gap=9, kl=1)]
    positive, negative = find_largest_effects(points, OFF, BUDGET, find_safe_range(points, OFF, BUDGET))
    assert (positive.dial, negative.dial) == (4, -2)


class Model:
    """A made-up curve that counts what was asked of it."""

    def __init__(self, make: Callable[[float], PointMetrics], budget: Budget = BUDGET) -> None:
        self.make = make
        self.measured: dict[float, PointMetrics] = {}
        self.measurer = PointMeasurer(self.measure_cheap, self.measure_all, OFF, budget)

    def measure_cheap(self, dial: float) -> PointMetrics:
        made = self.make(dial)
        return self.measured.setdefault(dial, PointMetrics(dial, gap=made.gap, kl=made.kl, kl_error=made.kl_error))

    def measure_all(self, dial: float) -> PointMetrics:
        self.measured[dial] = self.make(dial)
        return self.measured[dial]

    def range(self, centre: float = 0.0) -> SafeRange:
        found = find_safe_range(self.measured.values(), OFF, self.measurer.budget, centre)
        assert found is not None
        return found


@pytest.mark.parametrize(("size", "share"), [(SweepSize(), 0.05), (QUICK_SIZE, 0.25)])
def test_the_ends_are_found_where_the_divergence_meets_its_limit(size: SweepSize, share: float) -> None:
    model = Model(lambda dial: at(dial, kl=(dial / 11) ** 2 * 0.25 * (1 if dial > 0 else 4)))
    assert search_dials(model.measurer, "selective", size) == 0.0
    found = model.range()
    assert 11 * (1 - share) <= found.high <= 11
    assert -5.5 <= found.low <= -5.5 * (1 - share)
    # What is promised was measured.
    assert model.measured[found.high].complete
    assert model.measured[found.low].complete
    assert len(model.measured) < 24


def test_the_ends_are_found_where_another_limit_breaks() -> None:
    model = Model(lambda dial: at(dial, kl=abs(dial) / 1000, repetition=0.1 if abs(dial) < 21 else 0.9))
    search_dials(model.measurer, "selective", SweepSize())
    assert 18 < model.range().high < 21
    assert model.range().stopped_high == "repetition"


def test_where_only_the_divergence_is_limited_nothing_else_is_measured() -> None:
    budget = Budget(retention=0.0, repetition_slack=math.inf)
    model = Model(lambda dial: at(dial, kl=(dial / 11) ** 2 * 0.25, repetition=1.0, retention=0.1), budget)
    search_dials(model.measurer, "selective", SweepSize())
    assert 10 < model.range().high <= 11
    assert not any(found.complete for found in model.measured.values())
    points = list(model.measured.values())
    positive, _ = find_largest_effects(points, OFF, budget, model.range())
    assert positive.dial == model.range().high


def test_a_side_is_followed_until_something_keeps_the_budget() -> None:
    model = Model(lambda dial: at(dial, kl=abs(dial) / 40))
    search_dials(model.measurer, "selective", SweepSize(step=64.0, rounds=1))
    assert 0 < model.range().high <= 10


def test_questions_are_asked_no_further_than_the_first_broken_position() -> None:
    model = Model(lambda dial: at(dial, kl=dial * dial / 400))
    search_dials(model.measurer, "selective", SweepSize())
    whole = [abs(dial) for dial, found in model.measured.items() if found.complete]
    assert max(whole) <= 16


def test_a_steering_that_never_hurts_may_be_turned_all_the_way() -> None:
    model = Model(lambda dial: at(dial))
    search_dials(model.measurer, "selective", QUICK_SIZE)
    assert model.range() == SafeRange(-180, 180, "end", "end")


def test_a_first_step_too_far_is_followed_back() -> None:
    model = Model(lambda dial: at(dial, kl=dial * dial))
    search_dials(model.measurer, "selective", SweepSize())
    assert 0.4 < model.range().high <= 0.5


def test_addition_is_searched_on_a_scale_of_its_own() -> None:
    model = Model(lambda dial: at(dial, kl=(dial / 0.2) ** 2 * 0.25))
    search_dials(model.measurer, "addition", SweepSize())
    assert 0.19 <= model.range().high <= 0.2


def test_an_ablation_is_measured_on() -> None:
    model = Model(lambda dial: at(dial))
    assert search_dials(model.measurer, "ablation", SweepSize()) == 1.0
    assert list(model.measured) == [1.0]


@pytest.mark.parametrize("operator", ["standard", "adaptive"])
def test_a_turn_to_an_angle_is_searched_around_where_it_changes_least(operator: Operator) -> None:
    def make(dial: float) -> PointMetrics:
        away = (dial - 262 + 180) % 360 - 180
        return at(dial, kl=(away / 20) ** 2 * 0.25)

    model = Model(make)
    centre = search_dials(model.measurer, operator, SweepSize())
    assert abs(centre - 262) < 5
    found = model.range(centre)
    assert 242 <= found.low < 246
    assert 278 < found.high <= 282


def test_a_turn_that_hurts_everywhere_has_no_range() -> None:
    model = Model(lambda dial: at(dial, kl=5 + math.cos(math.radians(dial))))
    centre = search_dials(model.measurer, "standard", SweepSize())
    assert find_safe_range(model.measured.values(), OFF, BUDGET, centre) is None


def test_a_position_is_added_where_the_curve_bends() -> None:
    points = [at(d, gap=g) for d, g in ((2, 0.1), (4, 0.2), (8, 1.4), (16, 1.5))]
    assert find_sharpest_bend(points, OFF, BUDGET) in (6.0, 12.0)
    assert find_sharpest_bend(points[:1], OFF, BUDGET) is None
