"""`edge-steer sweep`: what every position of the dial does, and how far it may go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edge_steer.cli import options
from edge_steer.cli.numbers import FiniteRange

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edge_steer.contrast import Probe, PromptSet
    from edge_steer.evaluate.budget import Budget
    from edge_steer.evaluate.figures import Figures
    from edge_steer.evaluate.sweep import Curve
    from edge_steer.steering import Steering

# Texts here are short; a longer context costs memory only.
CONTEXT = 1024
OUTPUTS = ("sweep.csv", "sweep.json", "points.jsonl", "effect-damage.png", "by-angle.png", "layers.png")
# Of a user's own prompts, every fifth is kept from calibration.
HELD_OUT = 5


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
    ctx: int | None,
    gpu_layers: int,
    threads: int | None,
    seed: int,
    chat_template: str | None,
    rpc: tuple[str, ...],
    as_json: bool,
    force: bool,
) -> None:
    """Measure effect and damage over the dial, and the range that is safe.

    Stopped, it goes on where it was when it is run again.

    \b
    edge-steer sweep -m smollm2-135m -s happy.gguf -o out/ --write
    edge-steer sweep -m smollm2-135m --methods local,global,addition --preset sentiment -o methods/
    """
    import time
    from pathlib import Path

    from edge_steer.contrast import read_probes
    from edge_steer.errors import SteerError
    from edge_steer.evaluate.budget import Budget
    from edge_steer.evaluate.journal import Journal
    from edge_steer.evaluate.material import QUICK, Amounts, material
    from edge_steer.evaluate.parts import Bench
    from edge_steer.evaluate.search import QUICK as QUICK_EFFORT
    from edge_steer.evaluate.search import Effort
    from edge_steer.evaluate.sweep import Sweep, settings, with_range
    from edge_steer.gguf_metadata import read_gguf
    from edge_steer.steering import save_all

    begun = time.monotonic()
    if (steering is None) == (methods is None):
        raise click.UsageError("expected -s FILE or --methods NAMES")
    if write and steering is None:
        raise click.UsageError("--write stores a range in a steering file; give one with -s FILE")
    if (positive is None) != (negative is None):
        raise click.UsageError(f"expected --positive and --negative, got no --{'negative' if positive else 'positive'}")
    dials = _dials(angles)
    folder = Path(output)
    _check_folder(folder)
    outputs = [folder / each for each in OUTPUTS]
    options.check_not_an_input(outputs, model, steering, positive, negative, probes)
    own_probes = read_probes(probes) if probes else ()
    if steering is not None:
        steerings, held_out, known_probes = _from_file(steering, preset, positive, negative)
        path, parameters = _run_parameters(
            model, ctx, gpu_layers=gpu_layers, threads=threads, seed=seed, chat_template=chat_template, rpc=rpc
        )
    else:
        prompts, held_out, known_probes = _to_calibrate(preset, positive, negative)
        path, parameters = _run_parameters(
            model, ctx, gpu_layers=gpu_layers, threads=threads, seed=seed, chat_template=chat_template, rpc=rpc
        )
        steerings = _calibrated(path, parameters, prompts, str(methods).split(","), folder, force)
    if write and (refused := [each for each in steerings if each.operator not in ("selective", "addition")]):
        raise click.UsageError(f"--write stores a range around off; {refused[0].operator} has none")
    if write and read_gguf(Path(str(steering)), lambda key: key == "steering.count").tensors:
        raise SteerError(f"{steering} is a model that embeds a steering; --write needs a steering file of its own")
    amounts = QUICK if quick else Amounts()
    measured_on = material(amounts, own_probes or known_probes, held_out)
    if not measured_on.probes:
        options.note("no probes are known for these prompts: the effect is read in the answers; see --probes")
    llm = _model(path, steerings, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(
        folder / "points.jsonl", settings(Path(path), measured_on, steerings, "all"), force=force
    )  # fmt: skip
    if len(journal):
        options.note(f"{folder} holds {len(journal)} measurements of this sweep; it goes on from there")
    budget = Budget(kl=max_kl, retention=min_retention, errors=2.0, repetition_errors=1.0)
    effort = QUICK_EFFORT if quick else Effort()
    run = Sweep(Bench(llm, measured_on), journal, budget, tell=_told)
    try:
        curves = [run.curve(each, effort, dials) for each in steerings]
    except KeyboardInterrupt:
        options.note(f"stopped; the same command goes on from the {len(journal)} measurements in {folder}")
        raise
    about = {
        "model": Path(path).name,
        "amounts": vars(amounts),
        "material_sha256": measured_on.sha256,
        "budget": vars(budget),
        "seconds": round(time.monotonic() - begun, 1),
    }
    _write_outputs(curves, budget, about, folder)
    if write:
        assert steering is not None
        save_all([with_range(curve) for curve in curves], steering, force=True)
        options.note(f"stored the safe range in {steering}")
    if as_json:
        click.echo((folder / "sweep.json").read_text(encoding="utf-8"), nl=False)
    else:
        _print(curves, budget, folder)


# --- what to measure, and on what -----------------------------------------------------------------------------------


def _dials(angles: str | None) -> list[float]:
    import math

    from edge_steer.errors import SteerError

    try:
        dials = [float(each) for each in angles.split(",")] if angles else []
    except ValueError:
        dials = [math.nan]
    if not all(map(math.isfinite, dials)):
        raise SteerError(f"expected --angles such as -8,-4,4,8, got {angles}")
    return sorted({dial for dial in dials if dial})  # 0 is off, which is always measured


def _check_folder(folder: Path) -> None:
    import os

    from edge_steer.errors import SteerError

    if folder.exists() and not folder.is_dir():
        raise SteerError(f"expected a folder for -o, got the file {folder}; give another path")
    if not folder.exists() and not os.access(folder.absolute().parent, os.W_OK):
        raise SteerError(f"cannot write {folder}: its folder is missing or not writable; give another path")


def _from_file(
    file: str, preset: str | None, positive: str | None, negative: str | None
) -> tuple[list[Steering], PromptSet | None, tuple[Probe, ...]]:
    """The steerings in a file, held-out prompts, and probes: those of the preset given, or calibrated on."""
    from edge_steer.contrast import load_preset, prompt_set
    from edge_steer.evaluate.material import preset_of
    from edge_steer.steering import Steering

    steerings = Steering.load_all(file)
    held_out = prompt_set(positive, negative, "held-out") if positive and negative else None
    known = load_preset(preset) if preset else preset_of(steerings[0])
    return steerings, held_out, known.probes if known else ()


def _to_calibrate(
    preset: str | None, positive: str | None, negative: str | None
) -> tuple[PromptSet, PromptSet | None, tuple[Probe, ...]]:
    """The prompts that methods are calibrated on, those held out, and probes."""
    from dataclasses import replace

    from edge_steer.contrast import load_preset, prompt_set

    if (preset is None) == (positive is None):
        raise click.UsageError("expected --preset NAME, or --positive FILE with --negative FILE")
    if preset is not None:
        known = load_preset(preset)
        return known, None, known.probes
    prompts = prompt_set(str(positive), str(negative), "own")
    sides = (prompts.positive, prompts.negative)
    if min(map(len, sides)) < 2 * HELD_OUT:
        return prompts, None, ()
    kept = [tuple(each for i, each in enumerate(side) if (i + 1) % HELD_OUT) for side in sides]
    held_out = [side[HELD_OUT - 1 :: HELD_OUT] for side in sides]
    return (
        replace(prompts, positive=kept[0], negative=kept[1]),
        replace(prompts, positive=held_out[0], negative=held_out[1]),
        (),
    )


def _run_parameters(model: str, ctx: int | None, **run: Any) -> tuple[str, dict[str, Any]]:
    path, parameters = options.run_parameters(model, ctx=ctx, **run)
    return path, parameters if ctx else {**parameters, "n_ctx": min(CONTEXT, parameters["n_ctx"])}


def _calibrated(
    path: str, parameters: dict[str, Any], prompts: PromptSet, methods: Sequence[str], folder: Path, force: bool
) -> list[Steering]:
    """A steering a method, from one recording; kept in the folder, for the next run and for use."""
    from edge_steer.calibrate import passes
    from edge_steer.calibrate.native_recorder import NativeRecorder
    from edge_steer.calibrate.remembered import Remembered
    from edge_steer.cli.progress import bar
    from edge_steer.evaluate.methods import RECORDED, calibrated, check_methods
    from edge_steer.steering import Steering, save_all

    check_methods(methods)
    kept = folder / "methods.gguf"
    if kept.exists() and not force:
        found = [each for each in Steering.load_all(kept) if each.name in methods]
        if {each.name for each in found if each.made.prompts_sha256 == prompts.sha256} == set(methods):
            return found
    with bar("recording", passes(prompts)) as step:
        made = calibrated(
            Remembered(NativeRecorder(path, sites=RECORDED, **parameters)), prompts, methods, step, options.note
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_all(made, kept, force=True)
    return Steering.load_all(kept)


def _model(path: str, steerings: Sequence[Steering], parameters: dict[str, Any]) -> Any:
    """The model with all steerings, off. That they overlap is no surprise where one is measured at a time."""
    import warnings

    from edge_steer.runtime.llama import SteeredLlama

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*overlap")
        llm = SteeredLlama(
            path, steering=steerings, angles={each.name: None for each in steerings}, engine="hook", **parameters
        )
    options.note_plain_template(llm.chat_template.is_plain)
    return llm


# --- what comes of it -----------------------------------------------------------------------------------------------


def _told(name: str, at: Figures) -> None:
    """One line a position, as it is done."""
    where = "off" if at.dial is None else f"{at.dial:+g}"
    effect = "" if at.effect is None else f"  effect {at.effect:+.3f}"
    kept = "" if at.retention is None else f"  questions {at.retention:.0%}"
    repeated = "" if at.repetition is None else f"  repetition {at.repetition:.2f}"
    click.echo(f"{name:<10} {where:>7}{effect}  KL {at.kl or 0.0:.3f}{kept}{repeated}", err=True)


def _write_outputs(curves: Sequence[Curve], budget: Budget, about: dict[str, Any], folder: Path) -> None:
    from edge_steer.errors import SteerError
    from edge_steer.evaluate.plots import layer_map
    from edge_steer.evaluate.sweep_files import write_csv, write_json
    from edge_steer.evaluate.sweep_plots import by_dial, effect_against_damage

    write_csv(curves, folder / "sweep.csv")
    write_json(curves, about, folder / "sweep.json")
    named = ", ".join(curve.steering.name for curve in curves)
    title = f"{named} on {about['model']}"
    try:
        effect_against_damage(curves, budget, folder / "effect-damage.png", title)
        by_dial(curves, budget, folder / "by-angle.png", title)
        layer_map([curve.steering for curve in curves], folder / "layers.png", force=True)
    except SteerError as error:  # tables are worth having without pictures
        options.note(f"no pictures: {error}")


def _print(curves: Sequence[Curve], budget: Budget, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if len(curves) == 1:
        console.print(_positions(curves[0], Table))
        click.echo(f"\n{_recommended(curves[0])}")
    else:
        console.print(_comparison(curves, Table))
        for curve in curves:
            click.echo(_recommended(curve))
    click.echo(f"\n{folder}: {', '.join(OUTPUTS)}")


def _table(kind: Any, *titles: str) -> Any:
    made = kind(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, title in enumerate(titles):
        made.add_column(title, justify="left" if number == 0 else "right", no_wrap=True)
    return made


def _positions(curve: Curve, kind: Any) -> Any:
    from edge_steer.evaluate.sweep_files import is_safe

    made = _table(kind, "dial", "effect", "KL", "KL 99%", "perplexity", "questions", "repetition", "")
    rows = sorted([*curve.points, curve.off], key=lambda point: point.dial or 0.0)
    for at in rows:
        safe = "safe" if is_safe(curve, at) else ""
        made.add_row(
            "off" if at.dial is None else f"{at.dial:+g}", _shown(at.effect, "+.3f"), _shown(at.kl, ".3f"),
            _shown(at.kl_p99, ".2f"), _shown(at.perplexity, ".1f"), _shown(at.retention, ".1%"),
            _shown(at.repetition, ".2f"), safe,
        )  # fmt: skip
    return made


def _comparison(curves: Sequence[Curve], kind: Any) -> Any:
    made = _table(kind, "method", "largest −", "at", "largest +", "at", "both")
    for curve in sorted(curves, key=lambda each: -each.both):
        made.add_row(
            curve.steering.name,
            _shown(curve.negative.effect, "+.3f"), _shown(curve.negative.dial, "+g"),
            _shown(curve.positive.effect, "+.3f"), _shown(curve.positive.dial, "+g"),
            f"{curve.both:.3f}",
        )  # fmt: skip
    return made


def _recommended(curve: Curve) -> str:
    from edge_steer.evaluate.sweep_plots import unit

    if curve.within is None:
        return f"{curve.steering.name}: no position is within the budget"
    sign = unit(curve)
    return (
        f"{curve.steering.name}: recommended range {curve.within.low:+g}{sign} … {curve.within.high:+g}{sign} "
        f"(limited by {curve.within.stopped_low} and {curve.within.stopped_high}); largest effect in it "
        f"{curve.negative.effect or 0.0:+.3f} and {curve.positive.effect or 0.0:+.3f}"
    )


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
