"""A picture of a steering file: what every site is like, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.sites import KINDS
from edge_steer.steering import Steering
from edge_steer.sweep.figure import COLOURS, new_figure, save_figure, strip_frame

_MARKERS = "osD^v"


def direction_alignment(steering: Steering) -> NDArray[np.float64]:
    """(S,) mean cosine of a site's b1 with those of all other sites; 1 where one plane serves all, NaN for one site."""
    b1 = steering.basis[steering.site_plane, 0].astype(np.float64)
    if len(b1) < 2:
        return np.full(len(b1), math.nan)
    return np.asarray(((b1 @ b1.sum(0)) - (b1 * b1).sum(-1)) / (len(b1) - 1))


def plot_layers(steerings: Sequence[Steering], path: Path, *, force: bool = False) -> None:
    """Separation, alignment and mean norm by layer, a line for each kind of site; filled where the steering acts. One
    column each.

    Raises SteerError if matplotlib is missing or the file cannot be written.
    """
    figure = new_figure((1 + 6 * len(steerings), 8))
    axes = figure.subplots(3, len(steerings), sharex="col", squeeze=False)
    for column, steering in zip(axes.T, steerings, strict=True):
        _draw_column(column, steering)
    save_figure(figure, path, force=force)


def _draw_column(column: Sequence[Any], steering: Steering) -> None:
    """The three rows of one steering."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    above, middle, below = column
    rows = ((above, steering.separation), (middle, direction_alignment(steering)), (below, steering.mean_norm))
    kinds = [kind for kind in KINDS if any(site.kind == kind for site in steering.sites)]
    handles = []
    for number, kind in enumerate(kinds):
        colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
        _draw_kind(rows, steering, kind, colour, marker)
        handles.append(Line2D([], [], color=colour, marker=marker, label=kind))
    above.set_title(
        f"{steering.name}: {steering.negative} (−) to {steering.positive} (+), {steering.base.name}",
        fontsize="medium", parse_math=False,
    )  # fmt: skip
    above.set_ylabel("separation (standard deviations)")
    middle.set_ylabel("alignment (mean cosine with\nthe other sites' directions)")
    below.set_ylabel("mean ‖h‖")
    below.set_xlabel("layer")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles.append(
        Line2D([], [], color="grey", label="not steered", marker="o", markerfacecolor="white", linestyle="none")
    )
    above.legend(handles=handles, frameon=False, fontsize="small")
    for axis in column:
        axis.margins(y=0.1)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        strip_frame(axis)


def _draw_kind(
    rows: Sequence[tuple[Any, NDArray[Any]]], steering: Steering, kind: str, colour: str, marker: str
) -> None:
    """A line by layer in each row, for the sites of one kind."""
    at = [i for i, site in enumerate(steering.sites) if site.kind == kind]
    layers = [steering.sites[i].layer for i in at]
    for axis, all_values in rows:
        values = all_values[at]
        axis.plot(layers, values, color=colour, linewidth=1, alpha=0.5)
        for on in (True, False):
            here = [j for j, i in enumerate(at) if bool(steering.mask[i]) == on]
            axis.plot(
                [layers[j] for j in here], values[here], linestyle="none", marker=marker, color=colour,
                markerfacecolor=colour if on else "white",
            )  # fmt: skip
