"""`edge-steer doctor`: what this machine, this build and this model can do."""

from __future__ import annotations

import json
from typing import Any

import click

from edge_steer.cli import options
from edge_steer.cli.opening import run_parameters


@click.command()
@click.option("-m", "--model", metavar="MODEL", help="Also load this model and count the sites its graph really has.")
@options.run_options
@options.json_option
def doctor(model: str | None, run: options.RunOptions, as_json: bool) -> None:
    """Check this installation, and which sites of a model are met."""
    from edge_steer.runtime.doctor import examine_build, examine_model

    found: dict[str, Any] = examine_build()
    if model is not None:
        path, parameters = run_parameters(model, run)
        found["model"] = examine_model(path, **parameters)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    for key, value in found.items():
        if isinstance(value, dict):
            click.echo(f"{key}:")
            for inner, text in value.items():
                click.echo(f"  {inner}: {_format_value(text)}")
        else:
            click.echo(f"{key}: {_format_value(value)}")


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "–"
    return "yes" if value is True else "no" if value is False else str(value)
