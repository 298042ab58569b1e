"""`edge-steer verify`: the engines against each other on one model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edge_steer.cli import options
from edge_steer.cli.numbers import GPU_LAYERS, THREADS
from edge_steer.cli.opening import run_parameters

if TYPE_CHECKING:
    from edge_steer.verify.comparison import Comparison, Distance
    from edge_steer.verify.verification import Verification


@click.command()
@options.model_option
@click.option(
    "-s",
    "--steering",
    multiple=True,
    metavar="FILE[:ANGLE]",
    help="A steering file, with its angle; repeats.  [default: what the model's file embeds]",
)
@click.option("--angle", type=float, help="Angle in degrees (the coefficient for addition), for the one steering.")
@click.option("--hf", type=click.Path(), metavar="DIR", help="Hugging Face directory of the same model; needs torch.")
@click.option("--tokens", type=click.IntRange(1, 4096), default=256, show_default=True, help="Length of the text.")
@click.option("--gpu-layers", type=GPU_LAYERS, default=0, show_default=True, help="Layers on a GPU; -1 for all.")
@click.option("--threads", type=THREADS, help="Threads.  [default: llama-cpp-python's]")
@options.json_option
def verify(
    model: str,
    steering: tuple[str, ...],
    angle: float | None,
    hf: str | None,
    tokens: int,
    gpu_layers: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare hook, adapter, baked weights and transformers on one model and angle.

    Exits with 1 where two of them are further apart than their tolerance. Baked models are written to the temporary
    folder (TMPDIR), one at a time.

    \b
    edge-steer verify -m smollm2-135m -s happy.gguf
    edge-steer verify -m model.gguf -s happy.gguf --hf model/ --json
    """
    from edge_steer.cli.progress import bar
    from edge_steer.errors import SteerError
    from edge_steer.runtime.dials import named_steerings
    from edge_steer.verify.verification import verify as compare

    path, parameters = run_parameters(model, options.RunOptions(gpu_layers=gpu_layers, threads=threads))
    steerings, dials = named_steerings(steering or (path,), angle=angle, model=model)
    options.note_gates(steerings, "this comparison: it acts on every token")
    dialled = [(each.with_(gate=""), dials[each.name]) for each in steerings]
    found = compare(path, dialled, hf=hf, tokens=tokens, progress=bar, **parameters)
    if as_json:
        click.echo(json.dumps(_record(path, dials, found), ensure_ascii=False, indent=2))
    else:
        _print(path, dials, found)
    for line in found.notes:
        options.note(line)
    if failed := sorted((each for each in found.comparisons if not each.passed), key=_excess, reverse=True):
        more = f"; and {len(failed) - 1} more pairs" if len(failed) > 1 else ""
        raise SteerError(_failure(failed[0]) + more)


def _excess(pair: Comparison) -> float:
    return pair.steered.kl / max(pair.limit.kl, 1e-300)


def _record(path: str, dials: dict[str, float | None], found: Verification) -> dict[str, Any]:
    pairs = [{**asdict(each), "passed": each.passed} for each in found.comparisons]
    return {"model": path, "angles": dials, **asdict(found), "comparisons": pairs, "passed": found.passed}


def _failure(pair: Comparison) -> str:
    logits = (
        "" if pair.limit.logits is None else f", logits {pair.steered.logits:.1e} (at most {pair.limit.logits:.1e})"
    )
    return f"{pair.one} and {pair.other} differ: KL {pair.steered.kl:.1e} (at most {pair.limit.kl:.1e}){logits}"


def _print(path: str, dials: dict[str, float | None], found: Verification) -> None:
    from rich.console import Console
    from rich.table import Table

    def table(*titles: str) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, title in enumerate(titles):
            made.add_column(
                title, justify="right" if number else "left", no_wrap=bool(number), min_width=17 * (not number)
            )
        return made

    named = ", ".join(f"{name} at {dial:g}" for name, dial in dials.items() if dial is not None)
    click.echo(f"{named}; {path} ({found.weights}); {found.tokens} tokens\n")
    effects = table("what it changes", "KL", "logits", "top-1", "of the hook's")
    for engine, effect in found.effects.items():
        effects.add_row(engine, *_numbers(effect.changed), f"{effect.kept:.0%}")
    pairs = table("compared", "KL", "logits", "top-1", "KL at most", "unsteered", "")
    for pair in found.comparisons:
        unsteered = f"{pair.unsteered.kl:.1e}" if pair.unsteered else "–"
        verdict = "ok" if pair.passed else "FAR"
        pairs.add_row(f"{pair.one}, {pair.other}", *_numbers(pair.steered), f"{pair.limit.kl:.1e}", unsteered, verdict)
    console = Console()
    console.print(effects, "", pairs, sep="\n")
    if lost := ", ".join(f"{kind} {error:.1e}" for kind, error in found.rounding.items() if error):
        click.echo(f"\nwriting the baked weights in their own types cost, relative: {lost}")


def _numbers(found: Distance) -> tuple[str, str, str]:
    return f"{found.kl:.1e}", f"{found.logits:.1e}", f"{found.top1:.1%}"
