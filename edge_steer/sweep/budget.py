"""How much damage a user accepts, and the range of the dial that keeps within it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edge_steer.sweep.point_metrics import PointMetrics


@dataclass(frozen=True)
class Budget:
    """kl: nats per token on neutral text, at most. repetition: at most factor × unsteered + slack. retention: of the
    unsteered accuracy, at least.

    With 160 questions one answer is over half a percent, and some always turn by chance. So where the retention lies
    within its standard error of the limit, the confidence kept, which moves smoothly, is held to it instead.

    errors, repetition_errors: standard errors of the divergence and of the repetition that must fit within the limit
    beside the mean. A range that is to hold on text other than what was measured wants some.
    """

    kl: float = 0.25
    repetition_factor: float = 1.5
    repetition_slack: float = 0.05
    retention: float = 0.97
    errors: float = 0.0
    repetition_errors: float = 0.0

    def limited_kl(self, at: PointMetrics) -> float:
        """What is held to the limit on divergence."""
        assert at.kl is not None
        return at.kl + (self.errors * (at.kl_error or 0.0) if self.errors else 0.0)

    @property
    def limits_kl_alone(self) -> bool:
        """Whether nothing but the divergence is limited."""
        return self.retention <= 0 and math.isinf(self.repetition_slack)

    def most_repetition(self, off: PointMetrics) -> float:
        """The limit on repetition, for a model that repeats itself as at `off`."""
        return self.repetition_factor * (off.repetition or 0.0) + self.repetition_slack

    def broken_limits(self, at: PointMetrics, off: PointMetrics) -> list[str]:
        """The limits that the metrics break; what was not measured breaks none."""
        return [
            name
            for name, broken in (
                ("kl", at.kl is not None and self.limited_kl(at) > self.kl),
                ("retention", at.retention is not None and self._loses_accuracy(at)),
                ("repetition", at.repetition is not None and self._limited_repetition(at) > self.most_repetition(off)),
            )
            if broken
        ]

    def _limited_repetition(self, at: PointMetrics) -> float:
        assert at.repetition is not None
        return at.repetition + self.repetition_errors * (at.repetition_error or 0.0)

    def _loses_accuracy(self, at: PointMetrics) -> bool:
        assert at.retention is not None
        clear = abs(at.retention - self.retention) > (at.retention_error or 0.0)
        kept = at.retention if clear or at.confidence_kept is None else at.confidence_kept
        return kept < self.retention

    def allows(self, at: PointMetrics, off: PointMetrics) -> bool:
        """Whether all that is limited was measured, and no limit is broken."""
        measured = at.kl is not None if self.limits_kl_alone else at.complete
        return measured and not self.broken_limits(at, off)


@dataclass(frozen=True)
class SafeRange:
    """From `low` to `high` around `centre`, ends included: both were measured and keep within the budget.

    stopped_low, stopped_high: what broke just outside; "end" where nothing did up to the end of the dial.
    """

    low: float
    high: float
    stopped_low: str
    stopped_high: str


def find_safe_range(
    points: Iterable[PointMetrics], off: PointMetrics, budget: Budget, centre: float = 0.0
) -> SafeRange | None:
    """The widest range around `centre` of measured positions without one between them that breaks the budget.

    None where `centre` is itself a position that breaks it (0 never is, for operators that are off there).
    """
    by_dial = {point.dial: point for point in points if point.dial is not None}
    if centre in by_dial and budget.broken_limits(by_dial[centre], off):
        return None
    ends, stops = [], []
    for sign in (-1, 1):
        end, stop = centre, "end"
        for dial in sorted((d for d in by_dial if (d - centre) * sign > 0), key=lambda d: abs(d - centre)):
            if broken := budget.broken_limits(by_dial[dial], off):
                stop = ", ".join(broken)
                break
            if budget.limits_kl_alone or by_dial[dial].complete:
                end = dial
        ends.append(end)
        stops.append(stop)
    return SafeRange(ends[0], ends[1], stops[0], stops[1])


def find_largest_effects(
    points: Sequence[PointMetrics], off: PointMetrics, budget: Budget, safe_range: SafeRange | None
) -> tuple[PointMetrics, PointMetrics]:
    """The positions of largest positive and largest negative effect within the range; off where none does anything."""
    allowed = [
        point
        for point in points
        if safe_range is not None
        and point.dial is not None
        and safe_range.low <= point.dial <= safe_range.high
        and budget.allows(point, off)
    ]
    ranked = sorted([*allowed, off], key=lambda point: point.effect or 0.0)
    return ranked[-1], ranked[0]
