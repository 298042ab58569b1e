"""`edge-steer models`: list the known models, fetch some."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from edge_steer import registry
from edge_steer.cli.progress import fetching


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List known models, or fetch some."""
    if context.invoked_subcommand is not None:
        return
    from edge_steer.sharing.shipped import shipped_names

    rows = [(entry, registry.cached_path(entry.name)) for entry in registry.entries()]
    if as_json:
        listed = [
            {
                **asdict(entry),
                "source": entry.origin,
                "path": path and str(path),
                "steerings": shipped_names(entry.name),
            }
            for entry, path in rows
        ]
        click.echo(json.dumps(listed, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "model", "size", "licence", "cached", "steerings", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[2].justify = "right"
    for entry, path in rows:
        size = f"{entry.size / 1e6:,.0f} MB" if entry.size else "?"
        table.add_row(
            entry.name,
            entry.title,
            size,
            entry.licence,
            "yes" if path else "",
            str(len(shipped_names(entry.name)) or ""),
        )
    Console().print(table)


@models.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def fetch(names: tuple[str, ...]) -> None:
    """Download models into the cache; prints each one's path."""
    from edge_steer.fetch import fetch as fetch_model

    for name in names:
        with fetching(name) as progress:
            click.echo(fetch_model(name, progress))
