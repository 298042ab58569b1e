"""`edge-steer inspect`: what a steering file holds."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import click

from edge_steer.cli import options, outputs

if TYPE_CHECKING:
    from edge_steer.steering import Steering


def _number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if math.isnan(value) else float(f"{value:.6g}")


def as_record(steering: Steering) -> dict[str, Any]:
    """All of a steering but its vectors."""
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
        "provisional": steering.provisional,
        "gate": steering.gate,
        "steered": len(steering.steered),
        "base": vars(steering.base),
        "made": {name: _plain(value) for name, value in vars(steering.made).items()},
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


def _plain(value: Any) -> Any:
    return [_number(each) if isinstance(each, float) else each for each in value] if isinstance(value, tuple) else value


def _format(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _print(steering: Steering) -> None:
    click.echo(click.style(steering.name, bold=True) + (f": {steering.description}" if steering.description else ""))
    for key, text in _rows(steering).items():
        click.echo(f"  {key:<9}  {text}")
    _print_sites(steering)


def _rows(steering: Steering) -> dict[str, str]:
    """What there is to say beside the sites, by a word."""
    base, made = steering.base, steering.made
    unit = "" if steering.operator == "addition" else "°"
    acts = f"{len(steering.steered)} of {len(steering.sites)} sites"
    by = f"the {made.recorder or 'unknown'} recorder from {made.positive_count} + {made.negative_count} prompts"
    later = "see `edge-steer sweep --write`"
    if math.isnan(steering.angle_min) and math.isnan(steering.angle_max):
        range_ = f"not measured; {later}"
    else:
        range_ = f"{_format(steering.angle_min, '+.4g')} … {_format(steering.angle_max, '+.4g')}{unit}"
        range_ += f", provisional; {later}" if steering.provisional else ""
    rows = {
        "turns": f"{steering.negative} (−) to {steering.positive} (+)",
        "how": f"{steering.operator}, {steering.plane} planes, at {acts}",
        "model": f"{base.name or '–'} ({base.architecture}, {base.block_count} layers, width {base.embedding_length})",
        "angle": f"{_format(steering.angle, '+.4g')}{unit if not math.isnan(steering.angle) else ''}",
        "range": range_,
        "made": f"{made.date[:10] or '–'} by {'combining steerings' if made.recorder == 'combine' else by}",
    }
    if made.orthogonal_to:
        rows["without"] = f"what it shares with {', '.join(made.orthogonal_to)}"
    if made.candidates:
        rows["chosen"] = f"{made.candidates[0]}, among {', '.join(made.candidates[1:]) or 'none other'}"
    if steering.gate:
        rows["gate"] = steering.gate
    if steering.operator == "adaptive":
        rows["threshold"] = f"{steering.threshold:g}"
    if steering.operator == "ablation":
        del rows["angle"], rows["range"]
    return rows


def _print_sites(steering: Steering) -> None:
    """A line a layer, with the sites of each kind beside each other."""
    from edge_steer.sites import KINDS

    kinds = [kind for kind in KINDS if any(site.kind == kind for site in steering.sites)]
    where = {(site.layer, site.kind): i for i, site in enumerate(steering.sites)}
    click.echo("\n       " + "".join(f"   {kind:<20}" for kind in kinds).rstrip())
    click.echo("  layer" + ("   separation      ‖h‖ " * len(kinds)).rstrip())
    for layer in sorted({site.layer for site in steering.sites}):
        line = f"  {layer:>5}"
        for kind in kinds:
            i = where.get((layer, kind))
            if i is None:
                line += " " * 23
            else:
                mark = "●" if steering.mask[i] else " "
                separation, norm = _format(steering.separation[i], ".2f"), _format(steering.mean_norm[i], ".3g")
                line += f"   {mark}{separation:>9} {norm:>8} "
        click.echo(line.rstrip())
    click.echo("  ● steered; separation of the class means along b1, in standard deviations; ‖h‖ is a mean")


@click.command()
@click.argument("file")
@options.json_option
@click.option("--plot", metavar="PNG", help="Also draw separation, mask and mean norm by layer.")
@options.force_option
def inspect(file: str, as_json: bool, plot: str | None, force: bool) -> None:
    """Show what a steering file holds, layer by layer.

    FILE may be PACK.zip/NAME or hub:USER/REPO/NAME too.
    """
    from edge_steer.sharing.find import find_steerings

    steerings = find_steerings(file)
    if plot is not None:
        from edge_steer.sweep.layer_plot import plot_layers

        path = outputs.output_path(plot, force, file)
        plot_layers(steerings, path, force=force)
        options.note(f"wrote {path}")
    if as_json:
        click.echo(json.dumps([as_record(steering) for steering in steerings], ensure_ascii=False, indent=2))
        return
    for number, steering in enumerate(steerings):
        if number:
            click.echo()
        _print(steering)
