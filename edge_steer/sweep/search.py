"""Where to set the dial to measure: outward from off until the damage is plain, then closer to the ends of the budget.

Every position is asked for by its dial; what comes back are its metrics. Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_steer.calibration.dial import ADDITION_PER_DEGREE
from edge_steer.choices import Operator
from edge_steer.sweep.budget import Budget
from edge_steer.sweep.point_metrics import PointMetrics

# How far beyond the budget curves are followed, so that a plot shows where they go.
BEYOND = 4.0
# An end that is expected within this share beyond a position that was measured is not looked for.
CLOSE_ENOUGH = 0.03
MOST_ROUNDS = 6


@dataclass(frozen=True)
class SweepSize:
    """How many positions are measured. step: the first step in degrees. rounds: of halving at each end of the range.
    bends: positions added, each where the curve bends most."""

    step: float = 4.0
    rounds: int = 3
    bends: int = 2


QUICK_SIZE = SweepSize(rounds=1, bends=0)


@dataclass(frozen=True)
class PointMeasurer:
    """Measures positions of one curve. measure_cheap: effect and divergence at a dial; measure_all: those, and all else
    that a budget asks for."""

    measure_cheap: Callable[[float], PointMetrics]
    measure_all: Callable[[float], PointMetrics]
    off: PointMetrics
    budget: Budget

    def limited_kl(self, dial: float) -> float:
        return self.budget.limited_kl(self.measure_cheap(dial))

    def is_allowed(self, dial: float) -> bool:
        """Whether the budget allows a position; the costly parts are measured only where the cheap ones do."""
        if self.budget.broken_limits(self.measure_cheap(dial), self.off):
            return False
        if self.budget.limits_kl_alone:
            return True
        return self.budget.allows(self.measure_all(dial), self.off)


def search_dials(measurer: PointMeasurer, operator: Operator, size: SweepSize, step: float | None = None) -> float:
    """Measure a curve where it matters. Returns the centre of its range: the dial that changes least, 0 where 0 is off.

    step: how far from the centre to look first; None: that of `size`, on the dial's scale. `standard` and `adaptive`
    turn to an angle: their circle is looked over first for where it hurts least. `ablation` has one position.
    """
    if operator == "ablation":
        measurer.is_allowed(1.0)
        return 1.0
    turns_to = operator in ("standard", "adaptive")
    unit, most = (ADDITION_PER_DEGREE, 2.0) if operator == "addition" else (1.0, 180.0)
    step = size.step * unit if step is None else step
    centre = _find_least_divergent(measurer) if turns_to else 0.0
    if turns_to and not measurer.is_allowed(centre):
        return centre
    for sign in (-1, 1):
        _search_side(measurer, size, centre, sign, step, most)
    return centre


def _find_least_divergent(measurer: PointMeasurer) -> float:
    """The dial on the circle with the least divergence, to 4 degrees."""
    found = {float(dial): measurer.limited_kl(float(dial)) for dial in range(0, 360, 30)}
    for step in (15.0, 7.5, 3.75):
        least = min(found, key=lambda dial: found[dial])
        for dial in (least - step, least + step):
            found[dial] = measurer.limited_kl(dial)
    return min(found, key=lambda dial: found[dial])


def _search_side(measurer: PointMeasurer, size: SweepSize, centre: float, sign: int, step: float, most: float) -> None:
    """Outward from the centre by doubling, then toward the end of the budget."""
    reached = step
    dials = [reached]
    while measurer.limited_kl(_dial_at(centre, sign, reached)) <= BEYOND * measurer.budget.kl and reached < most:
        reached = min(2 * reached, most)
        dials.append(reached)
    good, bad = 0.0, None
    for offset in dials:
        if not measurer.is_allowed(_dial_at(centre, sign, offset)):
            bad = offset
            break
        good = offset
    if bad is None:
        return
    for number in range(MOST_ROUNDS):
        # Without a position within the budget the side would have no effect at all: look on for one.
        if good and number >= size.rounds:
            break
        offset = _guess_between(measurer, centre, sign, good, bad)
        if offset - good < CLOSE_ENOUGH * offset:
            break
        if measurer.is_allowed(_dial_at(centre, sign, offset)):
            good = offset
        else:
            bad = offset


def _guess_between(measurer: PointMeasurer, centre: float, sign: int, good: float, bad: float) -> float:
    """A position between one within the budget and one beyond: where the divergence should meet its limit, on a
    straight line in logarithms, if that is what broke; else the middle."""
    limit = measurer.budget.kl
    low = measurer.limited_kl(_dial_at(centre, sign, good)) if good else 0.0
    high = measurer.limited_kl(_dial_at(centre, sign, bad))
    if good and 0 < low < limit < high:
        share = math.log(limit / low) / math.log(high / low)
        # A little inside: a position just beyond the limit ends no range.
        guess = float(good * (bad / good) ** (share * 0.97))
    elif not good and high > limit:
        guess = float(bad * math.sqrt(0.9 * limit / high))  # the divergence grows as the square, or somewhat slower
    else:
        guess = (good + bad) / 2
    return min(guess, bad - 0.05 * (bad - good))


def find_sharpest_bend(points: Sequence[PointMetrics], off: PointMetrics, budget: Budget) -> float | None:
    """The dial that would show most of where the effect's curve bends; None with fewer than three points.

    Of all three neighbours that span the largest triangle (in shares of the curve's width and height), the middle of
    the longer leg. Neighbours far beyond the budget count as none.
    """
    near = [point for point in points if point.dial is not None and _kl(point) <= BEYOND * budget.kl]
    curve = sorted({point.dial or 0.0: point.effect or 0.0 for point in [off, *near]}.items())
    if len(curve) < 3:
        return None
    dials, effects = np.array(curve).T
    x, y = dials / max(np.ptp(dials), 1e-9), effects / max(np.ptp(effects), 1e-9)
    a, b, c = slice(0, -2), slice(1, -1), slice(2, None)
    area = np.abs((x[b] - x[a]) * (y[c] - y[a]) - (x[c] - x[a]) * (y[b] - y[a]))
    middle = int(area.argmax()) + 1
    left_longer = dials[middle] - dials[middle - 1] >= dials[middle + 1] - dials[middle]
    beside = dials[middle - 1] if left_longer else dials[middle + 1]
    return _dial_at(0.0, 1, float(dials[middle] + beside) / 2)


def _dial_at(centre: float, sign: int, offset: float) -> float:
    """The dial at a distance from the centre, in steps that are read easily."""
    return round(centre + sign * offset, 2 if abs(offset) >= 1 else 4)


def _kl(at: PointMetrics) -> float:
    assert at.kl is not None
    return at.kl
