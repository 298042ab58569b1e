"""What all figures share: colours, an empty figure, a PNG file. matplotlib is an extra, imported where one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_steer.errors import SteerError
from edge_steer.whole_file import whole_file

# Okabe and Ito's colours, told apart by the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure, inches wide and high. Raises SteerError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SteerError("expected matplotlib for a plot, got none; pip install 'edge-steer[plot]'") from None
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: Path, *, force: bool) -> None:
    """Write a figure as PNG. Raises SteerError if the file cannot be written."""
    with whole_file(path, force=force) as part:
        figure.savefig(part, format="png", dpi=150)


def strip_frame(axis: Any) -> None:
    """Leave out the upper and right edge; a faint grid instead."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)
