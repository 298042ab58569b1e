"""A dial that works right after calibration: the angle at which a text changes by so much, found in seconds.

How much differs by model and site by a factor of fifty, so no fixed angle fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_steer.errors import NoEffectError
from edge_steer.measure.divergence import Divergence
from edge_steer.steering import Steering

# KL from unsteered on neutral text, nats per token, at the ends of a provisional range. A sweep allows 0.25, which is
# about twice the angle.
TARGET_KL = 0.08
# As near to the target as the dial is looked for.
TOLERANCE = 0.2
# Where to look first, in degrees: at norms a dial is some ten times as large as in the residual stream.
_FIRST_AT_NORMS, _FIRST_IN_STREAM = 12.0, 3.0
_MOST, _TRIES = 90.0, 12
# An angle turns the mean activation by tan θ of itself along b1; this much addition adds as much.
ADDITION_PER_DEGREE = math.tan(math.radians(1.0))
_WITH_RANGE = ("selective", "addition")


@dataclass(frozen=True)
class DialPosition:
    """A position and the divergence from unsteered measured there, nats per token."""

    angle: float
    kl: float


def has_range(steering: Steering) -> bool:
    """Whether there is a range around off: `ablation` has no dial, `standard` and `adaptive` turn to an angle."""
    return steering.operator in _WITH_RANGE


def find_dial(
    divergence: Divergence, steering: Steering, sign: int, *, first: float | None = None, target: float = TARGET_KL
) -> DialPosition:
    """The dial on one side of off at which the divergence is `target` to within TOLERANCE; at most 90 degrees.

    first: where to look first, above 0. The divergence grows as a power of the angle between 1 and 2, so
    θ ← θ √(target/KL), and between two angles around the target as the straight line in logarithms.
    Raises NoEffectError if even the last angle changes nothing.
    """
    scale = ADDITION_PER_DEGREE if steering.operator == "addition" else 1.0
    most = _MOST * scale
    in_stream = steering.steered[0].kind == "layer_out"
    angle = (_FIRST_IN_STREAM if in_stream else _FIRST_AT_NORMS) * scale if first is None else first
    below: DialPosition | None = None
    above: DialPosition | None = None
    best: DialPosition | None = None
    for _ in range(_TRIES):
        found = DialPosition(sign * angle, divergence.at(steering.name, sign * angle))
        if best is None or _miss(found, target) < _miss(best, target):
            best = found
        if _miss(found, target) <= math.log(1 + TOLERANCE) or (found.kl < target and angle >= most):
            break
        if found.kl < target:
            below = found
        else:
            above = found
        if below and above:
            slope = math.log(above.kl / max(below.kl, 1e-9)) / math.log(above.angle / below.angle)
            low, high = abs(below.angle), abs(above.angle)
            angle = low * (target / max(below.kl, 1e-9)) ** (1 / max(slope, 0.5))
            angle = min(max(angle, low * 1.02), high / 1.02)
        else:
            angle = min(angle * min(max(math.sqrt(target / max(found.kl, 1e-9)), 0.2), 5.0), most)
    assert best is not None
    if best.kl < 1e-5:
        raise NoEffectError(
            f"steering {steering.name!r} changes nothing up to {sign * angle:g}; calibrate it at other sites"
        )
    return best


def _miss(dial: DialPosition, target: float) -> float:
    return abs(math.log(max(dial.kl, 1e-12) / target))


def with_provisional_range(steering: Steering, low: DialPosition, high: DialPosition) -> Steering:
    """The steering with a provisional range, and its upper end as the default."""
    low_angle, high_angle = (float(f"{dial.angle:.3g}") for dial in (low, high))
    return steering.with_(angle=high_angle, angle_min=low_angle, angle_max=high_angle, provisional=True)
