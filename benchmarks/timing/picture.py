"""A picture of shares: how much of its baseline's speed each row keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from timing.rounds import Row, Times, shares

from edge_steer.sweep.figure import COLOURS, new_figure


def draw(path: Path, measured: Mapping[str, tuple[Sequence[Row], Times]], metrics: Mapping[str, str]) -> None:
    """One panel a metric, one line a row, one colour a model; the bar is the 95% interval, the tick the limit.

    measured: by model. Rows are told apart by their names, which may differ in what stands in brackets.
    """
    names: list[str] = []
    for rows, _ in measured.values():
        names += [row.name for row in rows if row.against and row.name not in names]
    figure = new_figure((4 + 4 * len(metrics), 1.6 + 0.42 * len(names)))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, (metric, title) in zip(panels, metrics.items(), strict=True):
        panel.axvline(1, color="#666666", linewidth=0.8)
        for number, (model, (rows, times)) in enumerate(measured.items()):
            colour, offset = COLOURS[number], 0.25 * (number - (len(measured) - 1) / 2)
            for row in rows:
                if row.against is None:
                    continue
                share = shares(row.name, row.against, times, [metric])[metric]
                y = names.index(row.name) + offset
                panel.plot([share.low, share.high], [y, y], color=colour, linewidth=2, alpha=0.6)
                panel.plot(share.median, y, "o", color=colour, markersize=4)
                if metric in row.limits:
                    panel.plot(row.limits[metric], y, "|", color="#222222", markersize=9)
            panel.plot([], [], "o-", color=colour, label=model)
        panel.set_title(f"{title.partition(',')[0]}: share of unsteered speed", loc="left", fontsize="medium")
        panel.grid(axis="x", alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", ncols=len(measured),
        loc="outside lower center",
    )  # fmt: skip
    figure.savefig(path, format="png", dpi=130)
