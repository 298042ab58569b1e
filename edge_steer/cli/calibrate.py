"""`edge-steer calibrate`: two lists of prompts to a steering file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edge_steer.choices import DEVICES, DTYPES, MASKS, OPERATORS, PLANES, Device, DType, Mask, Operator, Plane
from edge_steer.cli import options, outputs
from edge_steer.cli.opening import run_parameters

if TYPE_CHECKING:
    from edge_steer.calibration.engines import CalibrationEngine


@click.command()
@click.option(
    "-m",
    "--model",
    required=True,
    metavar="MODEL",
    help="A .gguf file, a name from `edge-steer models`, or (with torch) a Hugging Face directory or hub id.",
)
@click.option("--preset", metavar="NAME", help="One of `edge-steer presets`, instead of two files.")
@click.option("--positive", metavar="FILE", help="Prompts of the positive side: .txt, .jsonl or .csv.")
@click.option("--negative", metavar="FILE", help="Prompts of the negative side.")
@click.option("-o", "--output", required=True, metavar="FILE", help="Steering file to write.")
@click.option("--name", help="Name of the steering.  [default: the output's]")
@click.option(
    "--plane",
    type=click.Choice(PLANES),
    help="A plane for each site (local), that of one site for all (shared), or the paper's (global).  [default: chosen "
    "by measurement; local where --sites or --layers is given]",
)
@click.option(
    "--operator", type=click.Choice(OPERATORS), default="selective", show_default=True, help="What the steering does."
)
@click.option(
    "--sites",
    metavar="KINDS",
    help="auto (chosen by measurement), pre (norms before attention and feed-forward), norms (those and the one before "
    "the head), all (every norm of a block), or kinds by name, such as layer_out.  [default: auto; attn_norm with "
    "--plane local, layer_out with --plane shared, pre with --plane global]",
)
@click.option(
    "--layers",
    metavar="FIRST-LAST",
    help="Blocks of those sites, from 0.  [default: all; the upper half for layer_out and norms]",
)
@click.option(
    "--mask",
    type=click.Choice(MASKS),
    help="Steer sites that tell the classes apart, layers where every site does, or all.  "
    "[default: all; layer for --plane global with an operator that is not standard or adaptive]",
)
@click.option(
    "--orthogonal-to",
    multiple=True,
    metavar="PRESET|FILE",
    help="Project the direction of this preset, of apology, or of a steering out; repeats; none for nothing.  "
    "[default: refusal and apology, for another preset on a model that is near refusing]",
)
@click.option(
    "--gate", metavar="GATE", help="When it acts in an answer, such as @response or @after-thinking@first:50."
)
@click.option("--no-dial", is_flag=True, help="Leave out measuring a default angle and a provisional range.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Use the first N prompts of each side.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Prompts at once (torch).")
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="Where to run (torch).",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Of the weights (torch).",
)
@options.run_options
@options.force_option
def calibrate(
    model: str,
    preset: str | None,
    positive: str | None,
    negative: str | None,
    output: str,
    name: str | None,
    plane: Plane | None,
    operator: Operator,
    sites: str | None,
    layers: str | None,
    mask: Mask | None,
    orthogonal_to: tuple[str, ...],
    gate: str | None,
    no_dial: bool,
    limit: int | None,
    batch_size: int,
    device: Device,
    dtype: DType,
    force: bool,
    run: options.RunOptions,
) -> None:
    """Compute a steering from contrasting prompts.

    Sites and planes are chosen by measurement on the model itself, unless they are given; so are a default angle and a
    provisional range, which `sweep --write` replaces by a measured one.

    \b
    edge-steer calibrate -m smollm2-135m --preset sentiment -o happy.gguf
    edge-steer calibrate -m model.gguf --positive formal.txt --negative casual.txt -o formal.gguf
    """
    from edge_steer.calibration.pipeline import CalibrationOptions, calibrate_model, load_axes, load_prompts
    from edge_steer.cli.progress import bar
    from edge_steer.gate import Gate

    acts = str(Gate.parse(gate) or "") if gate else ""
    if (preset is None) == (positive is None and negative is None):
        raise click.UsageError("expected --preset NAME, or --positive FILE with --negative FILE")
    target = outputs.output_path(output, force, model, positive, negative, *orthogonal_to)
    if preset is None and (positive is None or negative is None):
        raise click.UsageError(f"expected --positive and --negative, got no --{'negative' if positive else 'positive'}")
    prompts = load_prompts(preset, positive, negative, target.stem, limit)
    blocks = _parse_layers(layers)
    if preset in orthogonal_to:
        raise click.UsageError(f"expected --orthogonal-to another preset than {preset} itself")
    wanted = CalibrationOptions(
        operator=operator, plane=plane, sites=sites, layers=blocks, mask=mask,
        orthogonal_to=load_axes(orthogonal_to, preset), dial=not no_dial,
    )  # fmt: skip
    engine = _open_engine(model, {"batch_size": batch_size, "device": device, "dtype": dtype}, run)
    steering = calibrate_model(engine, prompts, wanted, name=name or target.stem, progress=bar, note=options.note)
    steering.with_(gate=acts).save(target, force=force)
    options.note(
        f"{steering.name}: {steering.positive} (+) against {steering.negative} (−), {steering.operator}, "
        f"{steering.plane} planes, {len(steering.steered)} of {len(steering.sites)} sites, for {steering.base.name}"
    )
    click.echo(target)


def _parse_layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() or not dash)) or int(first) > int(last or first):
        raise click.UsageError(f"expected --layers such as 12-23, got {text}")
    return int(first), int(last or first)


def _open_engine(model: str, torch: dict[str, Any], run: options.RunOptions) -> CalibrationEngine:
    """What records and measures: llama.cpp for a GGUF, transformers for a Hugging Face directory or hub id."""
    from edge_steer.calibration.engines import NativeEngine, TorchEngine, is_hugging_face

    if not is_hugging_face(model):
        return NativeEngine(*run_parameters(model, run))
    if run.chat_template is not None:
        raise click.UsageError("--chat-template is for a GGUF; a Hugging Face model brings its own")
    return TorchEngine(model, torch)
