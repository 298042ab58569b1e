"""`edge-steer calibrate`: two lists of prompts to a steering file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge_steer.cli import options

if TYPE_CHECKING:
    from edge_steer.calibrate import Mask
    from edge_steer.calibrate.engines import CalibrationEngine
    from edge_steer.calibrate.torch_recorder import Device, DType
    from edge_steer.contrast import PromptSet
    from edge_steer.steering import Operator, Plane, Steering


# As in steering.py and calibrate/, which need numpy: `--help` does without.
PLANES = ("local", "shared", "global")
OPERATORS = ("selective", "standard", "adaptive", "ablation", "addition")
MASKS = ("site", "layer", "all")


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
    help="Steer sites that tell the classes apart, layers of which all sites do, or all.  "
    "[default: all; layer for --plane global with an operator that is not standard or adaptive]",
)
@click.option(
    "--orthogonal-to",
    multiple=True,
    metavar="PRESET|FILE",
    help="Project this preset's or steering's direction out; repeats; none for nothing.  [default: refusal, for "
    "another preset on a model that is near refusing]",
)
@click.option("--no-dial", is_flag=True, help="Leave out measuring a default angle and a provisional range.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Use the first N prompts of each side.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Prompts at once (torch).")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Where to run (torch).",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
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
    no_dial: bool,
    limit: int | None,
    batch_size: int,
    device: Device,
    dtype: DType,
    ctx: int | None,
    gpu_layers: int,
    threads: int | None,
    seed: int,
    chat_template: str | None,
    force: bool,
) -> None:
    """Compute a steering from contrasting prompts.

    Sites and planes are chosen by measurement on the model itself, unless they are given; so are a default angle and a
    provisional range, which `sweep --write` replaces by a measured one.

    \b
    edge-steer calibrate -m smollm2-135m --preset sentiment -o happy.gguf
    edge-steer calibrate -m model.gguf --positive formal.txt --negative casual.txt -o formal.gguf
    """
    from edge_steer.calibrate.pipeline import CalibrationOptions, calibrate_model
    from edge_steer.cli.progress import bar
    from edge_steer.contrast import load_preset, prompt_set

    if (preset is None) == (positive is None and negative is None):
        raise click.UsageError("expected --preset NAME, or --positive FILE with --negative FILE")
    target = options.output_path(output, force, model, positive, negative, *orthogonal_to)
    if preset is not None:
        prompts = load_preset(preset)
    elif positive is not None and negative is not None:
        prompts = prompt_set(positive, negative, target.stem)
    else:
        raise click.UsageError(f"expected --positive and --negative, got no --{'negative' if positive else 'positive'}")
    wanted = CalibrationOptions(
        operator=operator, plane=plane, sites=sites, layers=_layers(layers), mask=mask,
        orthogonal_to=_axes(orthogonal_to, preset), dial=not no_dial,
    )  # fmt: skip
    engine = _engine(
        model, batch_size=batch_size, device=device, dtype=dtype, ctx=ctx, gpu_layers=gpu_layers, threads=threads,
        seed=seed,
        chat_template=chat_template,
    )  # fmt: skip
    steering = calibrate_model(
        engine, prompts.first(limit) if limit else prompts, wanted, name=name or target.stem, progress=bar,
        note=options.note,
    )  # fmt: skip
    steering.save(target, force=force)
    options.note(
        f"{steering.name}: {steering.positive} (+) against {steering.negative} (−), {steering.operator}, "
        f"{steering.plane} planes, {len(steering.steered)} of {len(steering.sites)} sites, for {steering.base.name}"
    )
    click.echo(target)


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() or not dash)) or int(first) > int(last or first):
        raise click.UsageError(f"expected --layers such as 12-23, got {text}")
    return int(first), int(last or first)


def _axes(given: tuple[str, ...], preset: str | None) -> list[PromptSet | Steering] | None:
    """What is projected out: presets by name, steerings by file; None for what calibration finds best."""
    from edge_steer.contrast import load_preset, preset_names
    from edge_steer.steering import Steering

    if not given:
        return None if preset not in (None, "refusal") else []
    if given == ("none",):
        return []
    if preset in given:
        raise click.UsageError(f"expected --orthogonal-to another preset than {preset} itself")
    return [load_preset(each) if each in preset_names() else Steering.load(each) for each in given]


def _engine(
    model: str,
    *,
    batch_size: int,
    device: Device,
    dtype: DType,
    ctx: int | None,
    gpu_layers: int,
    threads: int | None,
    seed: int,
    chat_template: str | None,
) -> CalibrationEngine:
    """What records and measures: llama.cpp for a GGUF, transformers for a Hugging Face directory or hub id."""
    from pathlib import Path

    from edge_steer.calibrate.engines import NativeEngine, TorchEngine
    from edge_steer.registry import is_gguf

    if Path(model).is_dir() or ("/" in model and not is_gguf(model)):
        if chat_template is not None:
            raise click.UsageError("--chat-template is for a GGUF; a Hugging Face model brings its own")
        return TorchEngine(model, {"device": device, "dtype": dtype, "batch_size": batch_size})
    path, parameters = options.run_parameters(
        model, ctx=ctx, gpu_layers=gpu_layers, threads=threads, seed=seed, chat_template=chat_template
    )
    return NativeEngine(path, parameters)
