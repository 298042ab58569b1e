"""`edge-steer calibrate`: two lists of prompts to a steering file."""

from __future__ import annotations

import click

from edge_steer.cli import options
from edge_steer.steering import OPERATORS, PLANES


@click.command()
@click.option("-m", "--model", required=True, metavar="MODEL",
              help="A .gguf file, a name from `edge-steer models`, or (with torch) a Hugging Face directory or hub id.")
@click.option("--preset", help="One of `edge-steer presets`, instead of two files.")
@click.option("--positive", type=click.Path(), help="Prompts of the positive side: .txt, .jsonl or .csv.")
@click.option("--negative", type=click.Path(), help="Prompts of the negative side.")
@click.option("-o", "--output", required=True, type=click.Path(), help="Steering file to write.")
@click.option("--name", help="Name of the steering.  [default: the output's]")
@click.option("--plane", type=click.Choice(PLANES), default="local", show_default=True,
              help="A plane for each site, or one for all (the paper).")
@click.option("--operator", type=click.Choice(OPERATORS), default="selective", show_default=True)
@click.option("--sites", default="default", show_default=True,
              help="default (norms before attention and feed-forward), all (and those behind), or kinds by name.")
@click.option("--mask", type=click.Choice(["site", "layer", "all"]),
              help="Steer sites that tell the classes apart, layers of which all sites do, or all.  "
                   "[default: site, layer for --plane global, all for standard and adaptive]")
@click.option("--limit", type=click.IntRange(1), help="Use the first N prompts of each side.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Prompts at once (torch).")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True,
              help="Where to run (torch).")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="float32", show_default=True,
              help="Weights (torch).")
@options.run_options
@options.force_option
def calibrate(
    model: str,
    preset: str | None,
    positive: str | None,
    negative: str | None,
    output: str,
    name: str | None,
    plane: str,
    operator: str,
    sites: str,
    mask: str | None,
    limit: int | None,
    batch_size: int,
    device: str,
    dtype: str,
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
    from edge_steer.cli.progress import bar
    from edge_steer.contrast import load_preset, prompt_set
    from edge_steer.errors import SteerError
    from edge_steer.registry import is_gguf

    if (preset is None) == (positive is None and negative is None):
        raise click.UsageError("expected --preset NAME, or --positive FILE with --negative FILE")
    if preset is None and (positive is None or negative is None):
        raise click.UsageError(f"--{'negative' if negative is None else 'positive'} FILE is missing")
    target = Path(output)
    if target.exists() and not force:
        raise SteerError(f"{target} exists; give --force to overwrite it, or another -o")
    prompts = load_preset(preset) if preset else prompt_set(str(positive), str(negative), target.stem)
    if limit:
        prompts = prompts.first(limit)

    if is_gguf(model):
        from edge_steer.calibrate.native_recorder import NativeRecorder

        path, parameters = options.run_parameters(model, ctx=ctx, gpu_layers=gpu_layers, threads=threads, seed=seed)
        recorder = NativeRecorder(path, sites=sites, **parameters)
    else:
        from edge_steer.calibrate.torch_recorder import TorchRecorder

        recorder = TorchRecorder.load(model, sites=sites, device=device, dtype=dtype, batch_size=batch_size)
    options.note_plain_template(recorder.uses_plain_template)
    with bar("recording", len(prompts.positive) + len(prompts.negative)) as step:
        steering = compute(
            recorder, prompts, plane=plane, operator=operator, mask=mask, name=name or target.stem, step=step
        )
    steering.save(target, force=force)
    click.echo(
        f"{target}: {steering.name}, {steering.operator} in {steering.plane} planes at {len(steering.steered)} of "
        f"{len(steering.sites)} sites, {steering.positive} (+) against {steering.negative} (−), for {steering.base.name}",
        err=True,
    )
    click.echo(target)
