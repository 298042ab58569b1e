"""`edge-steer demo`: the whole way on a small real model."""

from __future__ import annotations

import click

from edge_steer.cli import options

MODEL = "smollm2-135m"
PRESET = "sentiment"
PROMPTS = (
    "How was your day?",
    "Write two sentences about the weather today.",
    "What do you think about the future?",
)


@click.command()
@click.option(
    "--angle",
    type=click.FloatRange(0, 180, min_open=True),
    default=10.0,
    show_default=True,
    help="Degrees to turn each way.",
)
@options.run_options
def demo(angle: float, ctx: int | None, gpu_layers: int, threads: int | None, seed: int) -> None:
    """Fetch a small model, make it gloomier and more cheerful, and measure it.

    Fetches SmolLM2-135M-Instruct (90 MB, once), calibrates the preset `sentiment` on it, and answers the same prompts
    turned to −, off and +.
    """
    from rich.console import Console

    from edge_steer.calibrate import calibrate as compute
    from edge_steer.calibrate.native_recorder import NativeRecorder
    from edge_steer.cli.progress import bar
    from edge_steer.contrast import load_preset
    from edge_steer.evaluate.metrics import probe_gaps
    from edge_steer.registry import cache_dir, resolve
    from edge_steer.runtime.chat import Sampling, stream_answer
    from edge_steer.runtime.llama import SteeredLlama

    resolve(MODEL, fetch=True)
    path, parameters = options.run_parameters(MODEL, ctx=ctx or 1024, gpu_layers=gpu_layers, threads=threads, seed=seed)
    prompts = load_preset(PRESET)
    with bar("calibrating", len(prompts.positive) + len(prompts.negative)) as step:
        steering = compute(NativeRecorder(path, **parameters), prompts, name=PRESET, step=step)
    kept = cache_dir() / f"demo-{PRESET}.gguf"
    steering.save(kept, force=True)

    llm = SteeredLlama(path, steering=steering, angle=None, **parameters)
    dials = ((-angle, prompts.negative_name), (None, "off"), (angle, prompts.positive_name))
    gaps = {}
    with bar("measuring", 3) as step:
        for dial, _ in dials:
            llm.angle = dial
            gaps[dial] = float(probe_gaps(llm, prompts.probes).mean())
            step(1)
    console = Console(highlight=False, soft_wrap=True)
    sampling = Sampling(max_tokens=60, seed=seed)
    for prompt in PROMPTS:
        console.print(f"\n[bold]{prompt}[/]")
        for dial, name in dials:
            llm.angle = dial
            text = " ".join("".join(stream_answer(llm, [{"role": "user", "content": prompt}], sampling)).split())
            shown = "  off" if dial is None else f"{dial:+4g}°"
            console.print(f"  [cyan]{shown} {name:>9}[/]  ", end="")
            console.print(text, markup=False)
    console.print(
        f"\nprobe gap (log-probability per token, {prompts.positive_name} − {prompts.negative_name} answers, "
        f"{len(prompts.probes)} probes), change from off:"
    )
    for dial in (-angle, angle):
        console.print(f"  {dial:+4g}°  {gaps[dial] - gaps[None]:+.2f}")
    console.print(
        f"\nThe steering is in {kept}. Talk to it:\n  edge-steer chat -m {MODEL} -s {kept}:{angle:g}", markup=False
    )
