"""Figures, as PNG files. matplotlib is an extra, imported where a figure is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_steer.errors import SteerError
from edge_steer.sites import KINDS
from edge_steer.steering import Steering
from edge_steer.whole_file import whole_file

_MARKERS = "osD^v"


def layer_map(steerings: Sequence[Steering], path: Path, *, force: bool = False) -> None:
    """Separation and mean norm by layer, a line for each kind of site; filled where the steering acts. One column each.

    Raises SteerError where matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise SteerError("expected matplotlib for a plot, got none; pip install 'edge-steer[plot]'") from None

    figure = Figure(figsize=(1 + 6 * len(steerings), 6), layout="constrained")
    axes = figure.subplots(2, len(steerings), sharex="col", squeeze=False)
    for (above, below), steering in zip(axes.T, steerings, strict=True):
        kinds = [kind for kind in KINDS if any(site.kind == kind for site in steering.sites)]
        for number, kind in enumerate(kinds):
            at = [i for i, site in enumerate(steering.sites) if site.kind == kind]
            layers = [steering.sites[i].layer for i in at]
            colour, marker = f"C{number}", _MARKERS[number % len(_MARKERS)]
            for axis, values in ((above, steering.separation[at]), (below, steering.mean_norm[at])):
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
        below.set_ylabel("mean ‖h‖")
        below.set_xlabel("layer")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [
            Line2D([], [], color=f"C{number}", marker=_MARKERS[number % len(_MARKERS)], label=kind)
            for number, kind in enumerate(kinds)
        ]
        handles.append(
            Line2D([], [], color="grey", label="not steered", marker="o", markerfacecolor="white", linestyle="none")
        )
        above.legend(handles=handles, frameon=False, fontsize="small")
        for axis in (above, below):
            axis.margins(y=0.1)
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.2)
    with whole_file(path, force=force) as part:
        figure.savefig(part, format="png", dpi=150)
