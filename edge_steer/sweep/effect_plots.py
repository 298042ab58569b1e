"""The pictures of a sweep. matplotlib is an extra, imported where a figure is drawn.

Curves differ by colour and by marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_steer.sweep.budget import Budget
from edge_steer.sweep.curve import Curve
from edge_steer.sweep.figure import COLOURS, new_figure, save_figure, strip_frame
from edge_steer.sweep.point_metrics import PointMetrics

MARKERS = "osD^vP"
_SAFE, _GREY = "#009E73", "#666666"


def plot_effect_against_damage(curves: Sequence[Curve], budget: Budget, path: Path, title: str) -> None:
    """Every curve from off outward: divergence on neutral text to the right, effect up and down, the dial beside it."""
    figure = new_figure((8.5, 5.5))
    axis = figure.subplots()
    right = 2.4 * budget.kl
    axis.axvspan(0, budget.kl, color=_SAFE, alpha=0.08, linewidth=0)
    axis.axvline(budget.kl, color=_SAFE, linewidth=1, linestyle="--")
    axis.axhline(0, color=_GREY, linewidth=0.8)
    for number, curve in enumerate(curves):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        line = _draw_curve(axis, curve, colour, marker)
        if len(curves) == 1:
            _mark_dials(axis, curve, line, right)
        _mark_largest(axis, curve, colour)
    near = [p.effect for c in curves for p in c.points if p.effect is not None and (p.kl or 0.0) <= 4 * budget.kl]
    low, high = min([0.0, *near]), max([0.0, *near])
    room = 0.12 * (high - low or 1.0)
    axis.set_ylim(low - room, high + room)
    axis.set_xlim(-0.04 * right, right)
    axis.set_xlabel("damage: KL from unsteered on neutral text (nats per token)")
    axis.set_ylabel(_effect_name(curves))
    axis.set_title(title, loc="left", fontsize="medium", parse_math=False)
    axis.text(budget.kl, low - 0.9 * room, " budget", color=_SAFE, fontsize="small", va="bottom")
    if len(curves) > 1:
        axis.legend(frameon=False, fontsize="small", loc="best")
    key = "filled: safe; ring: largest effect within the budget"
    axis.text(0.99, 0.01, key, transform=axis.transAxes, ha="right", fontsize="small", color=_GREY)
    strip_frame(axis)
    save_figure(figure, path, force=True)


def _draw_curve(axis: Any, curve: Curve, colour: str, marker: str) -> list[PointMetrics]:
    """Effect against divergence, filled where safe. Returns the points drawn, by dial, off among them."""
    line = [point for point in curve.points if point.kl is not None and point.effect is not None]
    line = sorted([PointMetrics(0.0, gap=0.0, kl=0.0), *line], key=lambda point: point.dial or 0.0)
    if curve.steering.operator in ("standard", "adaptive"):
        line = [point for point in line if point.kl]  # off is not at 0
    x, y = [point.kl or 0.0 for point in line], [point.effect or 0.0 for point in line]
    joined = "none" if curve.steering.operator == "ablation" else "-"
    axis.plot(x, y, color=colour, linewidth=1.6, linestyle=joined, alpha=0.9, zorder=2)
    for point in line:
        inside = curve.is_safe(point) and (point.complete or point.dial == 0.0)
        axis.plot(
            point.kl, point.effect, marker=marker, color=colour, markersize=5, zorder=3,
            markerfacecolor=colour if inside else "white",
        )  # fmt: skip
    axis.plot([], [], color=colour, marker=marker, label=_label(curve))
    return line


def plot_by_dial(curves: Sequence[Curve], budget: Budget, path: Path, title: str) -> None:
    """Effect and every limited damage against the dial, a column for each curve."""
    figure = new_figure((1.2 + 5.2 * len(curves), 8.5))
    axes = figure.subplots(4, len(curves), sharex="col", sharey="row", squeeze=False)
    figure.suptitle(title, fontsize="medium", parse_math=False)
    labels = (
        _effect_name(curves).replace("effect: change of probe gap", "effect"),
        "KL on neutral text\n(nats per token)",
        "questions still right\n(share of unsteered)",
        "repeated 4-grams\nin its answers",
    )
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    for column, curve in zip(axes.T, curves, strict=True):
        for axis, name in zip(column, ("effect", "kl", "retention", "repetition"), strict=True):
            _draw_metric(axis, curve, budget, name)
        near = [p.dial or 0.0 for p in curve.points if p.kl is not None and p.kl <= 4 * budget.kl]
        if near and curve.steering.operator in ("selective", "addition"):
            wide = max(map(abs, near))
            column[0].set_xlim(-1.08 * wide, 1.08 * wide)
        column[0].set_title(_label(curve), loc="left", fontsize="small", parse_math=False)
        column[-1].set_xlabel({"addition": "coefficient α"}.get(curve.steering.operator, "angle (degrees)"))
    save_figure(figure, path, force=True)


def _draw_metric(axis: Any, curve: Curve, budget: Budget, name: str) -> None:
    """One metric of PointMetrics by the dial, with its limit and the safe range."""
    colour = COLOURS[0]
    unsteered = {"effect": 0.0, "kl": 0.0, "retention": 1.0, "repetition": curve.off.repetition or 0.0}[name]
    limits = {"kl": budget.kl, "retention": budget.retention, "repetition": budget.most_repetition(curve.off)}
    points = [point for point in curve.points if getattr(point, name) is not None]
    x = [point.dial or 0.0 for point in points]
    y = [float(getattr(point, name)) for point in points]
    if curve.steering.operator in ("selective", "addition"):
        x, y = [list(each) for each in zip(*sorted([*zip(x, y, strict=True), (0.0, unsteered)]), strict=True)]
    else:
        axis.axhline(unsteered, color=_GREY, linewidth=0.8, linestyle=":")
    axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.5)
    if name == "effect":
        axis.axhline(0, color=_GREY, linewidth=0.8)
        errors = [point.gap_error or 0.0 for point in points]
        bars = [point.effect or 0.0 for point in points]
        axis.errorbar([p.dial or 0.0 for p in points], bars, errors, fmt="none", color=colour, alpha=0.4)
    else:
        axis.axhline(limits[name], color=_SAFE, linewidth=1, linestyle="--")
    if name == "kl":
        axis.set_ylim(-0.2 * budget.kl, 4 * budget.kl)
    if name == "retention":
        _draw_confidence(axis, points)
    if name == "repetition":
        axis.set_ylim(-0.01, max(axis.get_ylim()[1], 0.2))
    if curve.safe_range is not None and curve.safe_range.high > curve.safe_range.low:
        axis.axvspan(curve.safe_range.low, curve.safe_range.high, color=_SAFE, alpha=0.08, linewidth=0)
    strip_frame(axis)


def _draw_confidence(axis: Any, points: Sequence[PointMetrics]) -> None:
    kept = [point.confidence_kept for point in points]
    axis.plot([point.dial or 0.0 for point in points], kept, "x", color=COLOURS[1], label="confidence kept")
    axis.legend(frameon=False, fontsize="small", loc="lower center")
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.9), max(high, 1.03))


def _label(curve: Curve) -> str:
    steering = curve.steering
    if curve.safe_range is None:
        return f"{steering.name} (no range)"
    if steering.operator == "ablation":
        return steering.name
    return f"{steering.name}, safe {curve.safe_range.low:+g}{curve.unit} … {curve.safe_range.high:+g}{curve.unit}"


def _effect_name(curves: Sequence[Curve]) -> str:
    first = curves[0]
    ends = f"{first.steering.negative} ↓   {first.steering.positive} ↑"
    by_gap = first.off.gap is not None
    return f"effect: {'change of probe gap (nats per token)' if by_gap else 'self-read score (of ‖h‖)'}\n{ends}"


def _mark_dials(axis: Any, curve: Curve, line: Sequence[PointMetrics], right: float) -> None:
    """The dial beside its point, where there is room for it."""
    placed: list[tuple[float, float]] = []
    shown = [point for point in line if point.kl is not None and point.kl <= right]
    height = max(np.ptp([point.effect or 0.0 for point in shown]), 1e-9) if shown else 1.0
    ends = (curve.safe_range.low, curve.safe_range.high) if curve.safe_range else ()
    for point in sorted(shown, key=lambda each: (each.dial not in ends, -(each.kl or 0.0))):
        at = (point.kl or 0.0) / right, (point.effect or 0.0) / height
        if any(abs(at[0] - x) < 0.06 and abs(at[1] - y) < 0.05 for x, y in placed):
            continue
        placed.append(at)
        name = "off" if point.dial == 0 else f"{point.dial:+g}{curve.unit}"
        # Away from the curve, which runs outward and to the right.
        beside, side = ((8, 3), "left") if point.dial == 0 else ((-6, 5 if at[1] >= 0 else -12), "right")
        axis.annotate(
            name.replace("-", "−"), (point.kl, point.effect), xytext=beside, ha=side,
            textcoords="offset points", fontsize="small", color="black" if point.dial in ends else _GREY,
            fontweight="bold" if point.dial in ends else "normal",
        )  # fmt: skip


def _mark_largest(axis: Any, curve: Curve, colour: str) -> None:
    """A ring around the largest effect within the budget, each way."""
    for point in (curve.largest_positive, curve.largest_negative):
        if point.dial is not None and point.kl is not None:
            axis.plot(point.kl, point.effect, "o", markersize=12, markerfacecolor="none", color=colour, zorder=4)
