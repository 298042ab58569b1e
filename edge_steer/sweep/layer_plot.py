"""Figures, as PNG files. matplotlib is an extra, imported where a figure is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.sites import KINDS
from edge_steer.steering import Steering
from edge_steer.whole_file import whole_file

# Okabe and Ito's colours, told apart by the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^v"


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure, inches wide and high. Raises SteerError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SteerError("expected matplotlib for a plot, got none; pip install 'edge-steer[plot]'") from None
    return Figure(figsize=size, layout="constrained")


def alignment(steering: Steering) -> NDArray[np.float64]:
    """(S,) mean cosine of a site's b1 with those of all other sites; 1 where one plane serves all, NaN for one site."""
    b1 = steering.basis[steering.site_plane, 0].astype(np.float64)
    if len(b1) < 2:
        return np.full(len(b1), math.nan)
    return np.asarray(((b1 @ b1.sum(0)) - (b1 * b1).sum(-1)) / (len(b1) - 1))


def layer_map(steerings: Sequence[Steering], path: Path, *, force: bool = False) -> None:
    """Separation, alignment and mean norm by layer, a line for each kind of site; filled where the steering acts. One
    column each.

    Raises SteerError where matplotlib is missing or the file cannot be written.
    """
    figure = new_figure((1 + 6 * len(steerings), 8))
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(3, len(steerings), sharex="col", squeeze=False)
    for (above, middle, below), steering in zip(axes.T, steerings, strict=True):
        rows = ((above, steering.separation), (middle, alignment(steering)), (below, steering.mean_norm))
        kinds = [kind for kind in KINDS if any(site.kind == kind for site in steering.sites)]
        for number, kind in enumerate(kinds):
            at = [i for i, site in enumerate(steering.sites) if site.kind == kind]
            layers = [steering.sites[i].layer for i in at]
            colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
            for axis, all_values in rows:
                values = all_values[at]
                axis.plot(layers, values, color=colour, linewidth=1, alpha=0.5)
                for on in (True, False):
                    here = [j for j, i in enumerate(at) if bool(steering.mask[i]) == on]
                    axis.plot(
                        [layers[j] for j in here], values[here], linestyle="none", marker=marker, color=colour,
                        markerfacecolor=colour if on else "white",
                    )  # fmt: skip
        above.set_title(
            f"{steering.name}: {steering.negative} (−) to {steering.positive} (+), {steering.base.name}",
            fontsize="medium", parse_math=False,
        )  # fmt: skip
        above.set_ylabel("separation (standard deviations)")
        middle.set_ylabel("alignment (mean cosine with\nthe other sites' directions)")
        below.set_ylabel("mean ‖h‖")
        below.set_xlabel("layer")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [
            Line2D([], [], color=COLOURS[number % len(COLOURS)], marker=_MARKERS[number % len(_MARKERS)], label=kind)
            for number, kind in enumerate(kinds)
        ]
        handles.append(
            Line2D([], [], color="grey", label="not steered", marker="o", markerfacecolor="white", linestyle="none")
        )
        above.legend(handles=handles, frameon=False, fontsize="small")
        for axis in (above, middle, below):
            axis.margins(y=0.1)
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.2)
    with whole_file(path, force=force) as part:
        figure.savefig(part, format="png", dpi=150)
