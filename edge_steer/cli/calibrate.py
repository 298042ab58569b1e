"""`edge-steer calibrate`: two lists of prompts to a steering file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge_steer.cli import options

if TYPE_CHECKING:
    from edge_steer.calibrate import Mask
    from edge_steer.calibrate.native_recorder import NativeRecorder
    from edge_steer.calibrate.torch_recorder import Device, DType, TorchRecorder
    from edge_steer.steering import Operator, Plane


# As in steering.py and calibrate/, which need numpy: `--help` does without.
PLANES = ("local", "global")
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
    default="local",
    show_default=True,
    help="A plane for each site, or one for all (the paper).",
)
@click.option(
    "--operator", type=click.Choice(OPERATORS), default="selective", show_default=True, help="What the steering does."
)
@click.option(
    "--sites",
    metavar="KINDS",
    help="pre (norms before attention and feed-forward), all (and those behind), or kinds by name.  "
    "[default: attn_norm; pre for --plane global]",
)
@click.option(
    "--mask",
    type=click.Choice(MASKS),
    help="Steer sites that tell the classes apart, layers of which all sites do, or all.  "
    "[default: all; layer for --plane global with an operator that is not standard or adaptive]",
)
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
    plane: Plane,
    operator: Operator,
    sites: str | None,
    mask: Mask | None,
    limit: int | None,
    batch_size: int,
    device: Device,
    dtype: DType,
    ctx: int | None,
    gpu_layers: int,
    threads: int | None,
    seed: int,
    force: bool,
) -> None:
    """Compute a steering from contrasting prompts.

    \b
    edge-steer calibrate -m smollm2-135m --preset sentiment -o happy.gguf
    edge-steer calibrate -m model.gguf --positive formal.txt --negative casual.txt -o formal.gguf
    """
    from pathlib import Path

    from edge_steer.calibrate import calibrate as compute
    from edge_steer.calibrate import passes
    from edge_steer.cli.progress import bar
    from edge_steer.contrast import load_preset, prompt_set
    from edge_steer.registry import is_gguf

    if (preset is None) == (positive is None and negative is None):
        raise click.UsageError("expected --preset NAME, or --positive FILE with --negative FILE")
    target = options.output_path(output, force)
    if preset is not None:
        prompts = load_preset(preset)
    elif positive is not None and negative is not None:
        prompts = prompt_set(positive, negative, target.stem)
    else:
        raise click.UsageError(f"expected --positive and --negative, got no --{'negative' if positive else 'positive'}")
    if limit:
        prompts = prompts.first(limit)

    recorder: NativeRecorder | TorchRecorder
    recorded = sites or "pre"
    if Path(model).is_dir() or ("/" in model and not is_gguf(model)):
        from edge_steer.calibrate.torch_recorder import TorchRecorder

        recorder = TorchRecorder.load(model, sites=recorded, device=device, dtype=dtype, batch_size=batch_size)
    else:
        from edge_steer.calibrate.native_recorder import NativeRecorder

        path, parameters = options.run_parameters(model, ctx=ctx, gpu_layers=gpu_layers, threads=threads, seed=seed)
        recorder = NativeRecorder(path, sites=recorded, **parameters)
    options.note_plain_template(recorder.uses_plain_template)
    notes: list[str] = []
    with bar("recording", passes(prompts)) as step:
        steering = compute(
            recorder, prompts, plane=plane, operator=operator, mask=mask,
            kinds={site.kind for site in recorder.sites} if sites else None, name=name or target.stem, step=step,
            note=notes.append,
        )  # fmt: skip
    steering.save(target, force=force)
    for line in notes:
        options.note(line)
    options.note(
        f"{steering.name}: {steering.positive} (+) against {steering.negative} (−), {steering.operator}, "
        f"{steering.plane} planes, {len(steering.steered)} of {len(steering.sites)} sites, for {steering.base.name}"
    )
    click.echo(target)
