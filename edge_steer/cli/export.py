"""`edge-steer export`: a steering in the form of another program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_steer.cli import options, outputs
from edge_steer.export.formats import FORMATS, ExportJob

if TYPE_CHECKING:
    from edge_steer.steering import Steering


@click.command()
@click.option(
    "-m",
    "--model",
    required=True,
    metavar="MODEL",
    help="A .gguf file or a name from `edge-steer models`; a Hugging Face directory for peft and hf.",
)
@click.option(
    "-s",
    "--steering",
    multiple=True,
    required=True,
    metavar="FILE[:ANGLE]",
    help="A steering file, with its angle; repeats.",
)
@click.option("--to", required=True, type=click.Choice(tuple(FORMATS)), help="What to write.")
@click.option("--angle", type=float, help="Angle in degrees (the coefficient for addition), for the one steering.")
@click.option(
    "--steered-type",
    metavar="TYPE",
    help="gguf: write the steered quantized weights in this type, such as Q8_0.  [default: their own]",
)
@click.option("-o", "--output", required=True, type=click.Path(), help="File or folder to write.")
@options.force_option
def export(
    model: str,
    steering: tuple[str, ...],
    to: str,
    angle: float | None,
    steered_type: str | None,
    output: str,
    force: bool,
) -> None:
    """Write a steering for programs that know nothing of edge-steer.

    \b
    lora            adapters for llama.cpp: a pair for any angle, or one and an Ollama Modelfile with --angle
    peft            an adapter folder for transformers and vLLM, from a Hugging Face directory
    gguf, hf        the model with the steering folded into its weights
    embedded        the model with the steering in its metadata: edge-steer steers it, others run it as it is
    control-vector  for steerings calibrated with --sites layer_out --operator addition

    \b
    edge-steer export -m model.gguf -s happy.gguf --to lora -o happy-lora
    edge-steer export -m model.gguf -s happy.gguf --to gguf -o happy-model.gguf
    """
    from edge_steer.cli.progress import bar
    from edge_steer.errors import SteerError
    from edge_steer.fetch import resolve
    from edge_steer.runtime.dials import split_argument

    if steered_type is not None and to != "gguf":
        raise click.UsageError("--steered-type is for --to gguf")
    target = FORMATS[to]
    steerings = _load_steerings(steering, angle, model)
    if to != "embedded":
        options.note_gates([each for each, _ in steerings], "what is written: it acts on every token")
    path = resolve(model, fetch=True)
    if path.is_dir() != target.reads_folder:
        kinds = ("a Hugging Face directory", "a GGUF")
        wanted, got = kinds if target.reads_folder else kinds[::-1]
        raise SteerError(f"expected {wanted} for --to {to}, got {got} at {path}")
    job = ExportJob(path, Path(output), steerings, steered_type, force, bar)
    outputs.check_not_an_input(target.replaced_files(job), path, *(split_argument(each)[0] for each in steering))
    paths, described = target.write(job)
    click.echo(described, err=True)
    for written in paths:
        click.echo(written)


def _load_steerings(arguments: tuple[str, ...], angle: float | None, model: str) -> list[tuple[Steering, float | None]]:
    """The steerings of the arguments, with the dials that are given and None where none is."""
    from edge_steer.errors import SteerError
    from edge_steer.runtime.dials import load_argument, load_steerings

    found = [(each, dial) for several, dial in (load_argument(each, model) for each in arguments) for each in several]
    if angle is not None:
        if len(found) != 1:
            raise SteerError(f"--angle is for one steering, got {len(found)}; write -s FILE:ANGLE for each")
        found = [(found[0][0], angle)]
    load_steerings([each for each, _ in found])  # refuses two of one name
    return found
