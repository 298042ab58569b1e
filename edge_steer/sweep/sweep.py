"""The sweep: every curve's positions measured one after the other, each measurement kept as soon as it is known.

What is measured at a position, and why in two steps: the probe gap and the divergence on neutral text are cheap and
come first; questions, answers and their reading follow where a budget needs them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_steer.errors import SteerError
from edge_steer.measure.evaluation_set import EvaluationSet
from edge_steer.steering import Steering
from edge_steer.sweep.budget import Budget, find_largest_effects, find_safe_range
from edge_steer.sweep.curve import Curve
from edge_steer.sweep.journal import Journal, JournalKey
from edge_steer.sweep.measurements import (
    MODEL_MEASUREMENTS,
    ModelUnderTest,
    RawMeasurement,
    measure_held_out,
    measure_reading,
)
from edge_steer.sweep.point_metrics import ItemHalf, PointMetrics, compute_metrics
from edge_steer.sweep.search import PointMeasurer, SweepSize, find_sharpest_bend, search_dials

# Counts up where a measurement's numbers change their meaning, so that no journal mixes two.
VERSION = 1

MEASUREMENTS = (*MODEL_MEASUREMENTS, "held_out", "reading")

Report = Callable[[str, PointMetrics], object]


def _silent(_: str, __: PointMetrics) -> None:
    """No progress."""


def journal_settings(
    model: Path, evaluation_set: EvaluationSet, steerings: Sequence[Steering], scope: str
) -> dict[str, Any]:
    """All that would change a result, for the journal."""
    return {
        "version": VERSION,
        "model": model_fingerprint(model),
        "material": evaluation_set.sha256,
        "scope": scope,
        "steerings": {steering.name: steering.fingerprint for steering in steerings},
    }


def model_fingerprint(path: Path) -> str:
    """Size and hash of 64 places in a model's file: enough to tell models apart, quick where they are large."""
    size, block = path.stat().st_size, 1 << 16
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(64):
            file.seek(max(0, (size - block) * number // 63))
            digest.update(file.read(block))
    return digest.hexdigest()


@dataclass
class Sweep:
    """Measures steerings on a model, and remembers in a journal. half: judge by one half of the items only.

    report: called with a steering's name and its metrics as each position is done.
    """

    model: ModelUnderTest
    journal: Journal
    budget: Budget
    half: ItemHalf = None
    report: Report = _silent

    def measure_curve(self, steering: Steering, size: SweepSize, dials: Sequence[float] = ()) -> Curve:
        """One steering, at the dials given, else where `search_dials` looks."""
        off = self.measure_at(steering, None, complete=True)
        if not off.accuracy:
            raise SteerError("expected a model that answers some of the questions unsteered, got none right")
        measurer = PointMeasurer(
            measure_cheap=lambda dial: self.measure_at(steering, dial),
            measure_all=lambda dial: self.measure_at(steering, dial, complete=True),
            off=off, budget=self.budget,
        )  # fmt: skip
        if dials:
            for dial in dials:
                measurer.measure_all(dial)
            return self.evaluate_curve(steering)
        # How large a dial is differs by model; calibration has measured it.
        step = min(-steering.angle_min, steering.angle_max) if steering.provisional else None
        centre = search_dials(measurer, steering.operator, size, step)
        for _ in range(size.bends):
            bend = find_sharpest_bend(self.measured_points(steering), off, self.budget)
            if bend is not None:
                measurer.measure_cheap(bend)
        return self.evaluate_curve(steering, centre)

    def evaluate_curve(self, steering: Steering, centre: float = 0.0, half: ItemHalf = None) -> Curve:
        """What has been measured of a steering, judged by all items or one half; nothing is run but what is off."""
        half = self.half if half is None else half
        off, points = self.measure_at(steering, None, complete=True, half=half), self.measured_points(steering, half)
        safe_range = find_safe_range(points, off, self.budget, centre)
        positive, negative = find_largest_effects(points, off, self.budget, safe_range)
        return Curve(steering, off, tuple(points), centre, safe_range, positive, negative)

    def measured_points(self, steering: Steering, half: ItemHalf = None) -> list[PointMetrics]:
        """All positions measured, by dial."""
        half = self.half if half is None else half
        return [
            self._metrics_at(steering, dial, half)
            for dial in self.journal.dials(steering.fingerprint)
            if self._has(steering, dial, "text")
        ]

    def measure_at(
        self, steering: Steering, dial: float | None, *, complete: bool = False, half: ItemHalf = None
    ) -> PointMetrics:
        """The metrics at a dial, measured now unless they are known."""
        texts = self.model.evaluation_set
        wanted = ["probes"] if texts.probes else []
        wanted += ["held_out"] if texts.positive and texts.negative else []
        wanted += ["text"]
        wanted += ["questions", "answers"] if complete else []
        # Without probes the effect is read in the answers.
        wanted += [] if texts.probes else ["answers", "reading"]
        missing = [name for name in dict.fromkeys(wanted) if not self._has(steering, dial, name)]
        for name in missing:
            self.journal.put(self._key(steering, dial, name), self._measure(steering, dial, name))
        found = self._metrics_at(steering, dial, self.half if half is None else half)
        if missing:
            self.report(steering.name, found)
        return found

    def _metrics_at(self, steering: Steering, dial: float | None, half: ItemHalf) -> PointMetrics:
        on, off = (
            {
                name: self.journal[key]
                for name in MEASUREMENTS
                if (key := self._key(steering, each, name)) in self.journal
            }
            for each in (dial, None)
        )
        return compute_metrics(dial, on, off, half)

    def _has(self, steering: Steering, dial: float | None, name: str) -> bool:
        return self._key(steering, dial, name) in self.journal

    def _key(self, steering: Steering, dial: float | None, name: str) -> JournalKey:
        """Off, only what looks along a direction differs between steerings."""
        shared = dial is None and name in MODEL_MEASUREMENTS
        return JournalKey(None if shared else steering.fingerprint, dial, name)

    def _measure(self, steering: Steering, dial: float | None, name: str) -> RawMeasurement:
        if name == "reading":
            written = self.journal[self._key(steering, dial, "answers")]["tokens"]
            return measure_reading(self.model, steering, written)
        if name == "held_out":
            return measure_held_out(self.model, steering, dial)
        return MODEL_MEASUREMENTS[name](self.model, steering.name if dial is not None else None, dial)
