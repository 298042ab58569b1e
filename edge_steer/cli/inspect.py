"""`edge-steer inspect`: what a steering file holds."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from edge_steer.cli import options
from edge_steer.steering import Steering


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def as_record(steering: Steering) -> dict[str, Any]:
    """All of a steering but its vectors, for JSON: NaN becomes null."""
    base, made = steering.base, steering.made
    return {
        "name": steering.name,
        "description": steering.description,
        "positive": steering.positive,
        "negative": steering.negative,
        "operator": steering.operator,
        "plane": steering.plane,
        "planes": len(steering.basis),
        "rank": steering.basis.shape[1],
        "threshold": _number(steering.threshold),
        "angle": _number(steering.angle),
        "angle_min": _number(steering.angle_min),
        "angle_max": _number(steering.angle_max),
        "base": vars(base),
        "made": vars(made),
        "sites": [
            {
                "site": site.name,
                "layer": site.layer,
                "kind": site.kind,
                "mask": bool(steering.mask[i]),
                "plane": int(steering.site_plane[i]),
                "separation": _number(steering.separation[i]),
                "mean_norm": _number(steering.mean_norm[i]),
            }
            for i, site in enumerate(steering.sites)
        ],
    }


def _print(steering: Steering) -> None:
    from rich.console import Console
    from rich.table import Table

    def shown(value: float, form: str = ".2f") -> str:
        return "–" if math.isnan(value) else format(value, form)

    console = Console()
    base, made = steering.base, steering.made
    console.print(f"[bold]{steering.name}[/]  {steering.description}", highlight=False)
    console.print(f"{steering.positive} (+) against {steering.negative} (−)", highlight=False)
    console.print(
        f"{steering.operator}, {steering.plane} planes, steers {len(steering.steered)} of {len(steering.sites)} sites",
        highlight=False,
    )
    console.print(
        f"for {base.name or '?'} ({base.architecture}, {base.block_count} blocks, width {base.embedding_length})",
        highlight=False,
    )
    console.print(
        f"angle {shown(steering.angle)}, safe range {shown(steering.angle_min)} … {shown(steering.angle_max)}"
        + (f", threshold {shown(steering.threshold)}" if steering.operator == "adaptive" else ""),
        highlight=False,
    )
    console.print(
        f"made by {made.recorder or '?'} on {made.date or '?'} from {made.positive_count} + {made.negative_count} prompts",
        highlight=False,
    )
    kinds = list(dict.fromkeys(site.kind for site in steering.sites))
    table = Table()
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(f"{kind}\nseparation", justify="right")
        table.add_column("mean ‖h‖", justify="right")
        table.add_column("steered", justify="center")
    where = {(site.layer, site.kind): i for i, site in enumerate(steering.sites)}
    for layer in sorted({site.layer for site in steering.sites}):
        cells = []
        for kind in kinds:
            i = where.get((layer, kind))
            if i is None:
                cells += ["", "", ""]
            else:
                cells += [shown(steering.separation[i]), shown(steering.mean_norm[i], ".3g"), "●" if steering.mask[i] else "·"]
        table.add_row(str(layer), *cells)
    console.print(table)


@click.command()
@click.argument("file", type=click.Path())
@options.json_option
def inspect(file: str, as_json: bool) -> None:
    """Show what a steering file holds, layer by layer.

    Separation is the distance of the class means along b1 in pooled standard deviations.
    """
    steerings = Steering.load_all(file)
    if as_json:
        click.echo(json.dumps([as_record(steering) for steering in steerings], ensure_ascii=False, indent=2))
        return
    for steering in steerings:
        _print(steering)
