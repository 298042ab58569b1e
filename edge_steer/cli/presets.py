"""`edge-steer presets`: the prompt sets that ship."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from edge_steer.preset import load_preset, preset_names
from edge_steer.prompts import PromptSet

EXAMPLES = 3
COLUMNS = ("name", "positive", "negative", "pairs", "probes", "measured", "description")


def _row(preset: PromptSet) -> dict[str, Any]:
    from edge_steer.sharing.shipped import shipped_names, shipped_packs

    return {
        "name": preset.name,
        "positive": preset.positive_name,
        "negative": preset.negative_name,
        "pairs": len(preset.positive),
        "probes": len(preset.probes),
        "measured": [model for model in shipped_packs() if preset.name in shipped_names(model)],
        "description": preset.description,
    }


def _examples(preset: PromptSet) -> dict[str, Any]:
    pairs = zip(preset.positive[:EXAMPLES], preset.negative, strict=False)
    return {
        "example_pairs": [{"positive": positive.prompt, "negative": negative.prompt} for positive, negative in pairs],
        "example_probes": [vars(probe) for probe in preset.probes[:EXAMPLES]],
    }


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def presets(name: str | None, as_json: bool) -> None:
    """List the presets, or show one.

    With NAME: that preset, with three of its prompt pairs and probes.
    """
    if name is None:
        rows = [_row(load_preset(each)) for each in preset_names()]
        if as_json:
            click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        elif sys.stdout.isatty():
            _print_table(rows)
        else:
            click.echo("\t".join(COLUMNS))
            for row in rows:
                click.echo("\t".join(_cells(row)))
        return

    preset = load_preset(name)
    row, examples = _row(preset), _examples(preset)
    if as_json:
        click.echo(json.dumps(row | examples, ensure_ascii=False, indent=2))
        return
    click.echo(f"{preset.name}: {preset.description}")
    click.echo(f"{row['pairs']} pairs, {preset.positive_name} (+) against {preset.negative_name} (-), such as")
    for pair in examples["example_pairs"]:
        click.echo(f"\n  + {pair['positive']}\n  - {pair['negative']}")
    if row["measured"]:
        click.echo(f"\nmeasured for {', '.join(row['measured'])}: -s {preset.name} needs no calibration there")
    click.echo(f"\n{row['probes']} probes, such as")
    for probe in examples["example_probes"]:
        click.echo(f"\n  {probe['prompt']}\n  + {probe['positive']}\n  - {probe['negative']}")


def _cells(row: dict[str, Any]) -> list[str]:
    return [", ".join(cell) if isinstance(cell := row[column], list) else str(cell) for column in COLUMNS]


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)
