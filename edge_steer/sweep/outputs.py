"""The folder that a sweep writes: journal, tables and pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_steer.errors import SteerError
from edge_steer.sweep.budget import Budget
from edge_steer.sweep.curve import Curve
from edge_steer.sweep.effect_plots import plot_by_dial, plot_effect_against_damage
from edge_steer.sweep.layer_plot import plot_layers
from edge_steer.sweep.tables import write_csv, write_json

JOURNAL, TABLE, JSON = "points.jsonl", "sweep.csv", "sweep.json"
OUTPUTS = (TABLE, JSON, JOURNAL, "effect-damage.png", "by-angle.png", "layers.png")


def check_output_folder(folder: Path) -> None:
    """Raise SteerError where `folder` is a file, or cannot be made."""
    if folder.exists() and not folder.is_dir():
        raise SteerError(f"expected a folder for -o, got the file {folder}; give another path")
    if not folder.exists() and not os.access(folder.absolute().parent, os.W_OK):
        raise SteerError(f"cannot write {folder}: its folder is missing or not writable; give another path")


def write_outputs(
    curves: Sequence[Curve], budget: Budget, about: dict[str, Any], folder: Path, note: Callable[[str], object]
) -> None:
    """Tables, and pictures where they can be drawn; `note` is told where they cannot."""
    write_csv(curves, folder / TABLE)
    write_json(curves, about, folder / JSON)
    named = ", ".join(curve.steering.name for curve in curves)
    title = f"{named} on {about['model']}"
    try:
        plot_effect_against_damage(curves, budget, folder / "effect-damage.png", title)
        plot_by_dial(curves, budget, folder / "by-angle.png", title)
        plot_layers([curve.steering for curve in curves], folder / "layers.png", force=True)
    except SteerError as error:  # tables are worth having without pictures
        note(f"no pictures: {error}")
