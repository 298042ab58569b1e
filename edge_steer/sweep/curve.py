"""One steering, swept: what was measured at every position of its dial, and what a budget allows of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_steer.errors import SteerError
from edge_steer.steering import Steering
from edge_steer.sweep.budget import SafeRange
from edge_steer.sweep.point_metrics import PointMetrics


@dataclass(frozen=True)
class Curve:
    """One steering, swept. `off` and `points` (by dial) are its metrics; `centre` is where its range lies around.

    safe_range: None where there is none. Positions measured in part are among the points.
    largest_positive, largest_negative: the positions of largest effect each way within the budget.
    """

    steering: Steering
    off: PointMetrics
    points: tuple[PointMetrics, ...]
    centre: float
    safe_range: SafeRange | None
    largest_positive: PointMetrics
    largest_negative: PointMetrics

    @property
    def both_effects(self) -> float:
        """The largest effect in each direction within the budget, summed."""
        return (self.largest_positive.effect or 0.0) - (self.largest_negative.effect or 0.0)

    @property
    def unit(self) -> str:
        """What the dial counts."""
        return {"addition": "", "ablation": ""}.get(self.steering.operator, "°")

    def is_safe(self, point: PointMetrics) -> bool:
        """Whether a position lies in the safe range; off does."""
        if point.dial is None:
            return True
        return self.safe_range is not None and self.safe_range.low <= point.dial <= self.safe_range.high


def with_safe_range(curve: Curve) -> Steering:
    """The steering with its safe range stored, and half of its positive end (or negative, where that is 0) as default
    dial where it has none but a provisional one.

    Raises SteerError if no position but off is within the budget.
    """
    steering, found = curve.steering, curve.safe_range
    if found is None or found.low == found.high:
        raise SteerError(f"steering {steering.name!r}: expected a safe range to store, got none within the budget")
    given = not math.isnan(steering.angle) and not steering.provisional
    default = steering.angle if given else (found.high or found.low) / 2
    return steering.with_(angle_min=found.low, angle_max=found.high, angle=default, provisional=False)
