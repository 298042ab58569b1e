"""`edge-steer demo`: the whole way on a small real model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge_steer.cli import options
from edge_steer.cli.opening import run_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_steer.runtime.llama import SteeredLlama

MODEL = "smollm2-135m"
PRESET = "sentiment"
PROMPTS = (
    "Write one sentence about the sea.",
    "Write one sentence about the weather today.",
    "In one sentence: what do you think about the future?",
)
LONGEST = 40  # tokens of an answer


@click.command()
@options.run_options
@click.option(
    "-m", "--model", default=MODEL, show_default=True, metavar="MODEL", help="A .gguf file or a known model's name."
)
def demo(model: str, run: options.RunOptions) -> None:
    """The whole way on a small model: gloomier, and more cheerful.

    Fetches SmolLM2-135M-Instruct (98 MB, once), calibrates the preset `sentiment` on it, and answers the same prompts
    at both ends of the range that calibration measured, and off.
    """
    from edge_steer.calibration.engines import NativeEngine
    from edge_steer.calibration.pipeline import CalibrationOptions, calibrate_model
    from edge_steer.cli.progress import bar
    from edge_steer.measure.metrics import probe_gaps
    from edge_steer.preset import load_preset
    from edge_steer.registry import cache_dir
    from edge_steer.runtime.llama import SteeredLlama

    path, parameters = run_parameters(model, run)
    prompts = load_preset(PRESET)
    steering = calibrate_model(
        NativeEngine(path, parameters), prompts, CalibrationOptions(orthogonal_to=None), name=PRESET, progress=bar
    )
    kept = cache_dir() / f"demo-{PRESET}.gguf"
    steering.save(kept, force=True)

    llm = SteeredLlama(path, steering=steering, angle=None, **parameters)
    low, high = steering.angle_min, steering.angle_max
    dials = ((low, prompts.negative_name), (None, "off"), (high, prompts.positive_name))
    gaps = {}
    with bar("measuring", len(dials)) as step:
        for dial, _ in dials:
            llm.angle = dial
            gaps[dial] = float(probe_gaps(llm, prompts.probes).mean())
            step(1)

    _print_answers(llm, dials, run.seed)
    click.echo(
        f"\nMeasured on {len(prompts.probes)} probes, how much likelier {prompts.positive_name} answers became than "
        f"{prompts.negative_name} ones\n(change of the gap of their log-probabilities per token):"
    )
    for dial in (low, high):
        click.echo(f"  {dial:+.3g}°  {gaps[dial] - gaps[None]:+.2f}")
    click.echo(f"\nTalk to it, and turn the dial with /angle:\n  edge-steer chat -m {model} -s {kept}")


def _print_answers(llm: SteeredLlama, dials: Sequence[tuple[float | None, str]], seed: int) -> None:
    """The answers to PROMPTS at each of the named dials."""
    import shutil
    import textwrap

    from edge_steer.runtime.answer import Sampling
    from edge_steer.runtime.chat import generate_answer

    sampling = Sampling(max_tokens=LONGEST, seed=seed)
    width = min(100, shutil.get_terminal_size().columns)
    for prompt in PROMPTS:
        click.secho(f"\n{prompt}", bold=True)
        for dial, name in dials:
            llm.angle = dial
            answer = generate_answer(llm, [{"role": "user", "content": prompt}], sampling)
            text = answer.text if answer.generated_tokens < LONGEST else _cut(answer.text)
            head = f"  {'' if dial is None else f'{dial:+.3g}°':>6} {name:<9} "
            lines = textwrap.wrap(" ".join(text.split()), width - len(head)) or [""]
            click.echo(click.style(head, fg="cyan") + f"\n{' ' * len(head)}".join(lines))


def _cut(text: str) -> str:
    """An unfinished answer up to its last whole sentence, if it has one."""
    head, stop, _ = text.rpartition(". ")
    return f"{head}{stop.strip()} …" if stop else f"{text} …"
