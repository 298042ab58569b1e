"""`edge-steer import`: what others published, as a steering file."""

from __future__ import annotations

import click

from edge_steer.cli import options, outputs


@click.command("import")
@click.argument("source", type=click.Path())
@click.option(
    "-m",
    "--model",
    required=True,
    metavar="MODEL",
    help="The model it is for: a .gguf file, a name from `edge-steer models`, or a Hugging Face directory.",
)
@click.option("-o", "--output", required=True, metavar="FILE", help="Steering file to write.")
@click.option("--name", help="Name of the steering.  [default: the output's]")
@options.force_option
def import_(source: str, model: str, output: str, name: str | None, force: bool) -> None:
    """Make a steering file of what others published.

    SOURCE is a published calibration of the method (a folder with plane.pt; needs torch) or a control vector of
    llama.cpp or repeng (.gguf), which acts as there: -s FILE:1 is scale 1.

    \b
    edge-steer import calibration_Llama-3.2-1B-Instruct/ -m llama-3.2-1b.gguf -o refusal.gguf
    edge-steer import vector.gguf -m model.gguf -o vector.steer.gguf
    """
    from edge_steer.cli.progress import fetching
    from edge_steer.fetch import resolve
    from edge_steer.importing import import_steering

    target = outputs.output_path(output, force, source, model)
    with fetching(model) as progress:
        path = resolve(model, fetch=True, progress=progress)
    steering = import_steering(source, path, name=name or target.stem)
    steering.save(target, force=force)
    options.note(
        f"{steering.name}: {steering.operator}, {len(steering.steered)} of {len(steering.sites)} sites, "
        f"for {steering.base.name}"
    )
    click.echo(target)
