"""`edge-steer export`: a steering in the form of another program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_steer.cli import options

if TYPE_CHECKING:
    from edge_steer.steering import Steering

TARGETS = ("lora", "peft", "control-vector", "gguf", "hf", "embedded")


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
@click.option("--to", required=True, type=click.Choice(TARGETS), help="What to write.")
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
    edge-steer export -m model.gguf -s happy.gguf:8 --to gguf -o happy-model.gguf
    """
    from edge_steer.errors import SteerError
    from edge_steer.fetch import resolve

    if steered_type is not None and to != "gguf":
        raise click.UsageError("--steered-type is for --to gguf")
    steerings = _given(steering, angle)
    path = resolve(model, fetch=True)
    wants_folder = to in ("peft", "hf")
    if path.is_dir() != wants_folder:
        kinds = ("a Hugging Face directory", "a GGUF")
        wanted, got = kinds if wants_folder else kinds[::-1]
        raise SteerError(f"expected {wanted} for --to {to}, got {got} at {path}")
    _check_outputs(output, to, path, steering)
    for written in _write(to, path, Path(output), steerings, steered_type, force):
        click.echo(written)


def _check_outputs(output: str, to: str, model: Path, steering: tuple[str, ...]) -> None:
    from edge_steer.export.lora import stem
    from edge_steer.runtime.dials import split_dial

    endings = (".gguf", ".Modelfile", "-cos.gguf", "-sin.gguf", ".md") if to == "lora" else ()
    outputs = [Path(f"{stem(output)}{ending}") for ending in endings] or [Path(output)]
    if to in ("peft", "hf"):  # a folder is replaced as a whole
        outputs = [each for each in Path(output).rglob("*") if each.is_file()]
    options.check_not_an_input(outputs, model, *(split_dial(each)[0] for each in steering))


def _given(arguments: tuple[str, ...], angle: float | None) -> list[tuple[Steering, float | None]]:
    """The steerings of the arguments, with the dials that are given and None where none is."""
    from edge_steer.errors import SteerError
    from edge_steer.runtime.dials import load_steerings, split_dial
    from edge_steer.steering import Steering

    found = [(each, dial) for path, dial in map(split_dial, arguments) for each in Steering.load_all(path)]
    if angle is not None:
        if len(found) != 1:
            raise SteerError(f"--angle is for one steering, got {len(found)}; write -s FILE:ANGLE for each")
        found = [(found[0][0], angle)]
    load_steerings([each for each, _ in found])  # refuses two of one name
    return found


def _write(
    to: str,
    model: Path,
    output: Path,
    given: list[tuple[Steering, float | None]],
    steered_type: str | None,
    force: bool,
) -> list[Path]:
    """Write the target; says on stderr what it is, and returns the paths."""
    from edge_steer.cli.progress import bar

    names = ", ".join(f"{each.name}:{dial:g}" if dial is not None else each.name for each, dial in given)
    if to == "embedded":
        from edge_steer.export.embedded import embed

        written = embed(model, output, given, force=force, progress=bar)
        _say(f"{written}: {model.name} with {names} in its metadata")
        return [written]
    if to == "lora" and len(given) == 1 and given[0][1] is None and given[0][0].operator != "ablation":
        from edge_steer.export.lora import export_pair

        pair = export_pair(model, output, given[0][0], force=force, progress=bar)
        _say(f"{pair[0]}, {pair[1]}: {names} at any angle for {model.name}; {pair[2].name} says how")
        return pair
    dialled = [(each, each.default_dial() if dial is None else dial) for each, dial in given]
    names = ", ".join(f"{each.name}:{dial:g}" for each, dial in dialled)
    if to == "lora":
        from edge_steer.export.lora import export_adapter

        one = export_adapter(model, output, dialled, force=force, progress=bar)
        _say(f"{one[0]}: {names} as one adapter for {model.name}, for scale 1")
        return one
    if to == "control-vector":
        from edge_steer.export.control_vector import control_vector

        written = control_vector(model, output, dialled, force=force)
        _say(f"{written}: {names} as a control vector for {model.name}, for scale 1")
        return [written]
    if to == "peft":
        from edge_steer.export.peft import export_peft

        written = export_peft(model, output, dialled, force=force, progress=bar)
        _say(f"{written}: {names} as a PEFT adapter for {model.name}")
        return [written]
    if to == "hf":
        from edge_steer.export.hf import bake_hf

        baked = bake_hf(model, output, dialled, force=force, progress=bar)
    else:
        from edge_steer.export.baked import bake_gguf

        baked = bake_gguf(model, output, dialled, steered_type=steered_type, force=force, progress=bar)
    rounding = ", ".join(f"{kind} {error:.1e}" for kind, error in baked.rounding.items() if error)
    untied = ", the head, which was the embedding, now a weight of its own" if baked.untied else ""
    rounded = f"; relative rounding: {rounding}" if rounding else ""
    _say(f"{baked.path}: {names} in {baked.weights} weights{untied}{rounded}")
    return [baked.path]


def _say(text: str) -> None:
    click.echo(text, err=True)
