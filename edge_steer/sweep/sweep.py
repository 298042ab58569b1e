"""The sweep: every curve's positions measured one after the other, each part kept as soon as it is known.

What is measured at a position, and why in two steps: the probe gap and the divergence on neutral text are cheap and
come first; questions, answers and their reading follow where a budget needs them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_steer.errors import SteerError
from edge_steer.measure.evaluation_set import Material
from edge_steer.steering import Steering
from edge_steer.sweep import measurements
from edge_steer.sweep.budget import Budget, SafeRange, best, safe_range
from edge_steer.sweep.journal import Journal, Place
from edge_steer.sweep.measurements import Bench, Part
from edge_steer.sweep.point_metrics import Figures, Half, figures
from edge_steer.sweep.search import Effort, Gauge, search, sharpest_bend

# Counts up where a part's numbers change their meaning, so that no journal mixes two.
VERSION = 1

Tell = Callable[[str, Figures], object]


def _silent(_: str, __: Figures) -> None:
    """No progress."""


@dataclass(frozen=True)
class Curve:
    """One steering, swept. `off` and `points` (by dial) are its figures; `centre` is where its range lies around.

    within: the safe range, None where there is none. Positions measured in part are among the points.
    """

    steering: Steering
    off: Figures
    points: tuple[Figures, ...]
    centre: float
    within: SafeRange | None
    positive: Figures
    negative: Figures

    @property
    def both(self) -> float:
        """The largest effect in each direction within the budget, summed."""
        return (self.positive.effect or 0.0) - (self.negative.effect or 0.0)


def with_range(curve: Curve) -> Steering:
    """The steering with its safe range stored, and half of its positive end (or negative, where that is 0) as default
    dial where it has none but a provisional one.

    Raises SteerError where no position but off is within the budget.
    """
    steering, within = curve.steering, curve.within
    if within is None or within.low == within.high:
        raise SteerError(f"steering {steering.name!r}: expected a safe range to store, got none within the budget")
    given = not math.isnan(steering.angle) and not steering.provisional
    default = steering.angle if given else (within.high or within.low) / 2
    return steering.with_(angle_min=within.low, angle_max=within.high, angle=default, provisional=False)


def settings(model: Path, material: Material, steerings: Sequence[Steering], scope: str) -> dict[str, Any]:
    """All that would change a result, for the journal."""
    return {
        "version": VERSION,
        "model": model_fingerprint(model),
        "material": material.sha256,
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
    """Measures steerings on a bench, and remembers in a journal. half: judge by one half of the items only.

    tell: called with a steering's name and its figures as each position is done.
    """

    bench: Bench
    journal: Journal
    budget: Budget
    half: Half = None
    tell: Tell = _silent

    def curve(self, steering: Steering, effort: Effort, dials: Sequence[float] = ()) -> Curve:
        """One steering, at the dials given, else where `search` looks."""
        off = self.at(steering, None, whole=True)
        if not off.accuracy:
            raise SteerError("expected a model that answers some of the questions unsteered, got none right")
        gauge = Gauge(
            light=lambda dial: self.at(steering, dial),
            whole=lambda dial: self.at(steering, dial, whole=True),
            off=off, budget=self.budget,
        )  # fmt: skip
        centre = 0.0
        if dials:
            for dial in dials:
                gauge.whole(dial)
        else:
            # How large a dial is differs by model; calibration has measured it.
            step = min(-steering.angle_min, steering.angle_max) if steering.provisional else None
            centre = search(gauge, steering.operator, effort, step)
            for _ in range(effort.bends):
                bend = sharpest_bend(self.points(steering), off, self.budget)
                if bend is not None:
                    gauge.light(bend)
        return self.judged(steering, centre)

    def judged(self, steering: Steering, centre: float = 0.0, half: Half = None) -> Curve:
        """What has been measured of a steering, judged by all items or one half; nothing is run but what is off."""
        half = self.half if half is None else half
        off, points = self.at(steering, None, whole=True, half=half), self.points(steering, half)
        within = safe_range(points, off, self.budget, centre)
        positive, negative = best(points, off, self.budget, within)
        return Curve(steering, off, tuple(points), centre, within, positive, negative)

    def points(self, steering: Steering, half: Half = None) -> list[Figures]:
        """All positions measured, by dial."""
        half = self.half if half is None else half
        return [
            self._figures(steering, dial, half)
            for dial in self.journal.dials(steering.fingerprint)
            if self._has(steering, dial, "text")
        ]

    def at(self, steering: Steering, dial: float | None, *, whole: bool = False, half: Half = None) -> Figures:
        """The figures at a dial, measured now unless they are known."""
        material = self.bench.material
        wanted = ["probes"] if material.probes else []
        wanted += ["held_out"] if material.positive and material.negative else []
        wanted += ["text"]
        wanted += ["questions", "answers"] if whole else []
        # Without probes the effect is read in the answers.
        wanted += [] if material.probes else ["answers", "reading"]
        missing = [name for name in dict.fromkeys(wanted) if not self._has(steering, dial, name)]
        for name in missing:
            self.journal.put(self._place(steering, dial, name), self._measure(steering, dial, name))
        found = self._figures(steering, dial, self.half if half is None else half)
        if missing:
            self.tell(steering.name, found)
        return found

    def _figures(self, steering: Steering, dial: float | None, half: Half) -> Figures:
        on, off = (
            {
                name: self.journal[place]
                for name in PARTS
                if (place := self._place(steering, each, name)) in self.journal
            }
            for each in (dial, None)
        )
        return figures(dial, on, off, half)

    def _has(self, steering: Steering, dial: float | None, name: str) -> bool:
        return self._place(steering, dial, name) in self.journal

    def _place(self, steering: Steering, dial: float | None, name: str) -> Place:
        """Off, only what looks along a direction differs between steerings."""
        shared = dial is None and name in measurements.MODEL_PARTS
        return Place(None if shared else steering.fingerprint, dial, name)

    def _measure(self, steering: Steering, dial: float | None, name: str) -> Part:
        if name == "reading":
            written = self.journal[self._place(steering, dial, "answers")]["tokens"]
            return measurements.reading(self.bench, steering, written)
        if name == "held_out":
            return measurements.held_out(self.bench, steering, dial)
        return measurements.MODEL_PARTS[name](self.bench, steering.name if dial is not None else None, dial)


PARTS = ("probes", "held_out", "text", "questions", "answers", "reading")
