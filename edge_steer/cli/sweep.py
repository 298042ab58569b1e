"""`edge-steer sweep`: what every position of the dial does, and how far it may go."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_steer.cli import options, outputs
from edge_steer.cli.numbers import FiniteRange
from edge_steer.cli.opening import run_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_steer.sweep.curve import Curve
    from edge_steer.sweep.point_metrics import PointMetrics

# Texts here are short; a longer context costs memory only.
CONTEXT = 1024


@click.command()
@options.model_option
@click.option("-s", "--steering", metavar="FILE", help="The steering file to measure.")
@click.option(
    "--methods",
    metavar="NAMES",
    help="Instead: methods to compare, of local,stream,global,standard,adaptive,ablation,addition.",
)
@click.option("--preset", metavar="NAME", help="A preset: its probes, and what --methods calibrates on.")
@click.option("--positive", metavar="FILE", help="Prompts: held out with -s, calibrated on with --methods.")
@click.option("--negative", metavar="FILE", help="Prompts of the negative side.")
@click.option("--probes", metavar="FILE", help="Probes, .jsonl: prompt, positive and negative answer.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder for journal, tables and pictures.")
@click.option("--angles", metavar="LIST", help="Positions of the dial, such as -8,-4,4,8.  [default: found]")
@click.option("--quick", is_flag=True, help="Fewer texts and positions: a look, not a measurement.")
@click.option("--max-kl", type=FiniteRange(0, min_open=True), default=0.25, show_default=True,
              help="Budget: divergence on neutral text, nats per token.")  # fmt: skip
@click.option("--min-retention", type=FiniteRange(0, 1), default=0.97, show_default=True,
              help="Budget: share of the unsteered accuracy that must stay.")  # fmt: skip
@click.option("--write", is_flag=True, help="Store the safe range in the steering file.")
@options.run_options
@options.rpc_option
@options.json_option
@options.force_option
def sweep(
    model: str,
    steering: str | None,
    methods: str | None,
    preset: str | None,
    positive: str | None,
    negative: str | None,
    probes: str | None,
    output: str,
    angles: str | None,
    quick: bool,
    max_kl: float,
    min_retention: float,
    write: bool,
    as_json: bool,
    force: bool,
    run: options.RunOptions,
) -> None:
    """Measure effect and damage over the dial, and the range that is safe.

    Resumes after Ctrl-C when it is run again.

    \b
    edge-steer sweep -m smollm2-135m -s happy.gguf -o out/ --write
    edge-steer sweep -m smollm2-135m --methods local,global,addition --preset sentiment -o methods/
    """
    from edge_steer.cli.progress import bar
    from edge_steer.sweep.inputs import check_can_store, read_inputs
    from edge_steer.sweep.outputs import JSON, OUTPUTS, check_output_folder
    from edge_steer.sweep.run import SweepOptions, run_sweep

    _check_usage(steering, methods, preset, positive, negative, write)
    dials = _parse_dials(angles)
    folder = Path(output)
    check_output_folder(folder)
    outputs.check_not_an_input([folder / each for each in OUTPUTS], model, steering, positive, negative, probes)
    inputs = read_inputs(steering, preset=preset, positive=positive, negative=negative, probes=probes)
    if write and steering is not None:
        if inputs.without_range:
            raise click.UsageError(f"--write stores a range around off; {inputs.without_range[0].operator} has none")
        check_can_store(steering)
    path, parameters = run_parameters(model, run)
    if run.ctx is None:
        parameters["n_ctx"] = min(CONTEXT, parameters["n_ctx"])
    wanted = SweepOptions(
        methods=() if methods is None else tuple(methods.split(",")), dials=dials, quick=quick, max_kl=max_kl,
        min_retention=min_retention, store_in=steering if write else None, force=force,
    )  # fmt: skip
    curves = run_sweep(
        inputs, path, parameters, folder, wanted, progress=bar, note=options.note, report=_print_position
    )
    if as_json:
        click.echo((folder / JSON).read_text(encoding="utf-8"), nl=False)
    else:
        _print(curves)
        click.echo(f"\n{folder}: {', '.join(OUTPUTS)}")


def _check_usage(
    steering: str | None,
    methods: str | None,
    preset: str | None,
    positive: str | None,
    negative: str | None,
    write: bool,
) -> None:
    if (steering is None) == (methods is None):
        raise click.UsageError("expected -s FILE or --methods NAMES")
    if write and steering is None:
        raise click.UsageError("--write stores a range in a steering file; give one with -s FILE")
    if (positive is None) != (negative is None):
        raise click.UsageError(f"expected --positive and --negative, got no --{'negative' if positive else 'positive'}")
    if methods is not None and (preset is None) == (positive is None):
        raise click.UsageError("expected --preset NAME, or --positive FILE with --negative FILE")


def _parse_dials(angles: str | None) -> tuple[float, ...]:
    from edge_steer.errors import SteerError

    try:
        dials = [float(each) for each in angles.split(",")] if angles else []
    except ValueError:
        dials = [math.nan]
    if not all(map(math.isfinite, dials)):
        raise SteerError(f"expected --angles such as -8,-4,4,8, got {angles}")
    return tuple(sorted({dial for dial in dials if dial}))  # 0 is off, which is always measured


def _print_position(name: str, at: PointMetrics) -> None:
    """One line a position, as it is done."""
    where = "off" if at.dial is None else f"{at.dial:+g}"
    effect = "" if at.effect is None else f"  effect {at.effect:+.3f}"
    kept = "" if at.retention is None else f"  questions {at.retention:.0%}"
    repeated = "" if at.repetition is None else f"  repetition {at.repetition:.2f}"
    click.echo(f"{name:<10} {where:>7}{effect}  KL {at.kl or 0.0:.3f}{kept}{repeated}", err=True)


def _print(curves: Sequence[Curve]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if len(curves) == 1:
        console.print(_position_table(curves[0], Table))
        click.echo(f"\n{_recommend(curves[0])}")
    else:
        console.print(_method_table(curves, Table))
        for curve in curves:
            click.echo(_recommend(curve))


def _new_table(kind: Any, *titles: str) -> Any:
    made = kind(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, title in enumerate(titles):
        made.add_column(title, justify="left" if number == 0 else "right", no_wrap=True)
    return made


def _position_table(curve: Curve, kind: Any) -> Any:
    made = _new_table(kind, "dial", "effect", "KL", "KL 99%", "perplexity", "questions", "repetition", "")
    rows = sorted([*curve.points, curve.off], key=lambda point: point.dial or 0.0)
    for at in rows:
        safe = "safe" if curve.is_safe(at) else ""
        made.add_row(
            "off" if at.dial is None else f"{at.dial:+g}", _format(at.effect, "+.3f"), _format(at.kl, ".3f"),
            _format(at.kl_p99, ".2f"), _format(at.perplexity, ".1f"), _format(at.retention, ".1%"),
            _format(at.repetition, ".2f"), safe,
        )  # fmt: skip
    return made


def _method_table(curves: Sequence[Curve], kind: Any) -> Any:
    made = _new_table(kind, "method", "largest −", "at", "largest +", "at", "both")
    for curve in sorted(curves, key=lambda each: -each.both_effects):
        made.add_row(
            curve.steering.name,
            _format(curve.largest_negative.effect, "+.3f"), _format(curve.largest_negative.dial, "+g"),
            _format(curve.largest_positive.effect, "+.3f"), _format(curve.largest_positive.dial, "+g"),
            f"{curve.both_effects:.3f}",
        )  # fmt: skip
    return made


def _recommend(curve: Curve) -> str:
    if curve.safe_range is None:
        return f"{curve.steering.name}: no position is within the budget"
    sign = curve.unit
    return (
        f"{curve.steering.name}: recommended range {curve.safe_range.low:+g}{sign} … {curve.safe_range.high:+g}{sign} "
        f"(limited by {curve.safe_range.stopped_low} and {curve.safe_range.stopped_high}); largest effect in it "
        f"{curve.largest_negative.effect or 0.0:+.3f} and {curve.largest_positive.effect or 0.0:+.3f}"
    )


def _format(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
