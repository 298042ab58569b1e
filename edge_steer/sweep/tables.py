"""What a sweep leaves behind: a table for spreadsheets, and JSON with everything that a reader may want to redo."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_steer.sweep.curve import Curve
from edge_steer.sweep.layer_plot import direction_alignment
from edge_steer.sweep.point_metrics import PointMetrics
from edge_steer.whole_file import whole_file


def write_csv(curves: Sequence[Curve], path: Path) -> None:
    """One row a position, off first: the steering's name, whether the position lies in the safe range, all metrics."""
    with whole_file(path, force=True) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["steering", "operator", "safe", *PointMetrics(None).record()])
        writer.writeheader()
        for curve in curves:
            for point in (curve.off, *curve.points):
                row = {key: value for key, value in point.record().items() if value is not None}
                named = {"steering": curve.steering.name, "operator": curve.steering.operator}
                writer.writerow({**named, "safe": int(curve.is_safe(point)), **row})


def write_json(curves: Sequence[Curve], about: dict[str, Any], path: Path) -> None:
    """`about` the run, then every curve: its steering, safe range and what stopped it, best positions, all positions,
    and site by site the separation, mean norm and alignment.

    Raw numbers, item by item, are in the journal beside it.
    """
    found = {**about, "curves": [_record(curve) for curve in curves]}
    with whole_file(path, force=True) as part:
        part.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _record(curve: Curve) -> dict[str, Any]:
    steering = curve.steering
    aligned = direction_alignment(steering)
    return {
        "steering": steering.name,
        "fingerprint": steering.fingerprint,
        "operator": steering.operator,
        "plane": steering.plane,
        "negative": steering.negative,
        "positive": steering.positive,
        "made": vars(steering.made),
        "safe_range": None if curve.safe_range is None else vars(curve.safe_range),
        "largest_positive": curve.largest_positive.record(),
        "largest_negative": curve.largest_negative.record(),
        "both_directions": curve.both_effects,
        "off": curve.off.record(),
        "points": [{**point.record(), "safe": curve.is_safe(point)} for point in curve.points],
        "sites": [
            {
                "site": site.name, "steered": bool(steering.mask[i]), "separation": _number(steering.separation[i]),
                "mean_norm": _number(steering.mean_norm[i]), "alignment": _number(aligned[i]),
            }
            for i, site in enumerate(steering.sites)
        ],
    }  # fmt: skip


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")
