"""How much each method can do within the damage budget: methods × presets × models, and whether safe ranges keep.

    python benchmarks/quality.py                                             # everything; hours on a laptop
    python benchmarks/quality.py --models smollm2-135m --presets sentiment   # one of each
    python benchmarks/quality.py --methods local,global,addition             # those of the headline first
    python benchmarks/quality.py --quick                                     # a look

Everything measured is kept in --work and not measured again: stop it, widen it, run it again. The page (its part of
docs/results.md, and pictures beside it) is written anew after every preset from all that --work holds.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from page import RESULTS, write_part

from edge_steer.calibration import calibrate
from edge_steer.calibration.cached_recorder import CachedRecorder
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.errors import SteerError
from edge_steer.fetch import resolve
from edge_steer.measure.evaluation_set import QUICK_SIZES, EvaluationSizes, build_evaluation_set
from edge_steer.preset import load_preset, preset_names
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering, save_all
from edge_steer.sweep.budget import Budget
from edge_steer.sweep.curve import Curve
from edge_steer.sweep.effect_plots import plot_effect_against_damage
from edge_steer.sweep.figure import COLOURS, new_figure
from edge_steer.sweep.journal import Journal
from edge_steer.sweep.measurements import ModelUnderTest
from edge_steer.sweep.methods import METHODS, RECORDED_SITES, check_methods
from edge_steer.sweep.search import QUICK_SIZE, SweepSize
from edge_steer.sweep.sweep import Sweep, journal_settings

# Coarser than a sweep's, for there are dozens of curves; the ends are as well verified.
SIZE = SweepSize(step=5.0, rounds=2, bends=0)
SIZES = EvaluationSizes(probes=12, passages=5, questions=120, answers=16, answer_tokens=32)
BUDGET = Budget()
# Of the three limits the steadiest: one answer that runs in circles, or two questions, can end a range by chance.
# What `sweep --write` stores is to hold on other text too.
TO_STORE = Budget(errors=2.0, repetition_errors=1.0)
KL_ALONE = Budget(retention=0.0, repetition_slack=math.inf)
OURS, PUBLISHED, RIVAL = "local", "global", "addition"

Row = dict[str, Any]  # of one preset on one model: what the page is made from


@click.command()
@click.option("--models", default="smollm2-135m,gemma3-270m", show_default=True)
@click.option("--presets", default=",".join(preset_names()), show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--quick", is_flag=True, help="Fewer texts and positions; kept apart from the full run.")
@click.option("--recalibrate", is_flag=True, help="Calibrate again what --work holds; do so after a change of planes.")
@click.option(
    "--promise", is_flag=True, help="Also check whether a range from one half of the items keeps on the other."
)
@click.option("--work", default="build/quality", show_default=True, help="Where measurements are kept.")
@click.option("--results", default=str(RESULTS), show_default=True, help="The page; pictures go beside it.")
@click.option("--threads", default=2, show_default=True)
def main(
    models: str,
    presets: str,
    methods: str,
    quick: bool,
    recalibrate: bool,
    promise: bool,
    work: str,
    results: str,
    threads: int,
) -> None:
    """Measure, and write the page."""
    run = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads}
    check_methods(methods.split(","))
    top = Path(work) / ("quick" if quick else "full")
    for model in models.split(","):
        path, name = resolve(model, fetch=True), Path(model).name.removesuffix(".gguf")
        for preset in presets.split(","):
            print(f"{model}, {preset}", file=sys.stderr, flush=True)
            folder = top / name / preset
            folder.mkdir(parents=True, exist_ok=True)
            steerings = steerings_of(path, preset, methods.split(","), folder / "methods.gguf", recalibrate, run)
            row = measure_methods(path, preset, steerings, folder, quick, run)
            row["promise"] = {} if not promise else check_promises(path, preset, steerings, folder, quick, run)
            row["left_out"] = [each for each in methods.split(",") if each not in {made.name for made in steerings}]
            (folder / "row.json").write_text(json.dumps({"model": name, "preset": preset, **row}, indent=1))
            write_page(top, Path(results))


# --- measuring ------------------------------------------------------------------------------------------------------


def steerings_of(
    path: Path, preset: str, methods: Sequence[str], kept: Path, recalibrate: bool, run: dict[str, Any]
) -> list[Steering]:
    """A steering for each method that the preset allows, those kept from an earlier run included."""
    found, left_out = {}, set()
    if kept.exists() and not recalibrate:
        found = {each.name: each for each in Steering.load_all(kept)}
        left_out = set(json.loads(kept.with_name("left_out.json").read_text()))
    if wanted := [name for name in methods if name not in {*found, *left_out}]:
        recorder, prompts = CachedRecorder(NativeRecorder(path, sites=RECORDED_SITES, **run)), load_preset(preset)
        for name in wanted:
            try:
                found[name] = calibrate(recorder, prompts, name=name, **METHODS[name])
            except SteerError as error:
                print_note(f"  {name} is left out: {error}")
                left_out.add(name)
        save_all(list(found.values()), kept, force=True)
        kept.with_name("left_out.json").write_text(json.dumps(sorted(left_out)))
    return [each for each in Steering.load_all(kept) if each.name in methods]


def measure_methods(
    path: Path, preset: str, steerings: Sequence[Steering], folder: Path, quick: bool, run: dict[str, Any]
) -> Row:
    """Every method's curve, judged by the whole budget and by the divergence alone."""
    texts = build_evaluation_set(QUICK_SIZES if quick else SIZES, load_preset(preset).probes)
    # Each curve is kept by its own fingerprint, so that methods may be added.
    journal = Journal.open(folder / "points.jsonl", journal_settings(path, texts, (), "all"))
    size = QUICK_SIZE if quick else SIZE
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*overlap")
        llm = SteeredLlama(path, steering=steerings, angles={each.name: None for each in steerings}, **run)
    with closing(llm):
        model = ModelUnderTest(llm, texts)
        sweep = Sweep(
            model, journal, BUDGET, report=lambda name, at: print_note(f"  {name} {at.dial} {at.effect} {at.kl}")
        )
        curves = [sweep.measure_curve(each, size) for each in steerings]
        by_kl = Sweep(model, journal, KL_ALONE)
        far = {each.name: by_kl.measure_curve(each, size) for each in steerings}
    plot_effect_against_damage(curves, BUDGET, folder / "effect-damage.png", f"{preset} on {path.name}")
    return {
        "amounts": asdict(QUICK_SIZES if quick else SIZES),
        "methods": [record(each, far[each.steering.name]) for each in curves],
    }


def record(curve: Curve, far: Curve) -> Row:
    """What the page tells of one curve; `far` is the same one where only the divergence is limited."""
    return {
        "method": curve.steering.name,
        "operator": curve.steering.operator,
        "sites": len(curve.steering.steered),
        "negative": curve.largest_negative.record(),
        "positive": curve.largest_positive.record(),
        "both": curve.both_effects,
        "far_negative": far.largest_negative.record(),
        "far_positive": far.largest_positive.record(),
        "far_both": far.both_effects,
        "range": None if curve.safe_range is None else asdict(curve.safe_range),
    }


def check_promises(
    path: Path, preset: str, steerings: Sequence[Steering], folder: Path, quick: bool, run: dict[str, Any]
) -> Row:
    """Of the default method, the range that the items of one half allow, and what the items of the other half say at
    its ends. On as much as a sweep measures, for half of little is nothing."""
    steering = next((each for each in steerings if each.name == OURS), None)
    if steering is None:
        return {}
    texts = build_evaluation_set(QUICK_SIZES if quick else EvaluationSizes(), load_preset(preset).probes)
    journal = Journal.open(folder / "promise.jsonl", journal_settings(path, texts, (), "all"))
    with closing(SteeredLlama(path, steering=steering, angle=None, **run)) as llm:
        by_half = Sweep(ModelUnderTest(llm, texts), journal, TO_STORE, half=0)
        return {OURS: check_promise(by_half, steering, QUICK_SIZE if quick else SIZE)}


def check_promise(by_half: Sweep, steering: Steering, size: SweepSize) -> Row:
    within = by_half.measure_curve(steering, size).safe_range
    assert within is not None
    other = Sweep(by_half.model, by_half.journal, BUDGET).evaluate_curve(steering, half=1)
    at = {point.dial: point for point in other.points}
    ends = {dial: at[dial] for dial in (within.low, within.high) if dial}
    return {
        "low": within.low,
        "high": within.high,
        "ends": [end.record() for end in ends.values()],  # as the other half has them
        "broken": {
            f"{dial:+g}": broken for dial, end in ends.items() if (broken := BUDGET.broken_limits(end, other.off))
        },
    }


def print_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- the page -------------------------------------------------------------------------------------------------------


def write_page(top: Path, results: Path) -> None:
    """The part of the results page that stands between the two marks, and its pictures."""
    rows = [json.loads(path.read_text()) for path in sorted(top.glob("*/*/row.json"))]
    models = list(dict.fromkeys(row["model"] for row in rows))
    parts = ["## Effect within the budget", "", *about(rows[0]), "", *headline(rows), ""]
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        picture = results.parent / f"quality-{model}.png"
        bars(mine, picture, model)
        curves = results.parent / f"quality-{model}-{mine[0]['preset']}.png"
        curves.write_bytes((top / model / mine[0]["preset"] / "effect-damage.png").read_bytes())
        parts += [f"### {model}", "", f"![Effect of every method within the budget]({picture.name})", ""]
        parts += [f"![Effect against damage, {mine[0]['preset']}]({curves.name})", "", *table(mine), ""]
    parts += ["## Do safe ranges keep their promise", "", *promises(rows)]
    write_part(results, "quality.py", "\n".join(parts))


def about(row: Row) -> list[str]:
    sizes = row["amounts"]
    return [
        f"`{' '.join(['python', *sys.argv])}`",
        "",
        "For every method the position of its dial with the largest effect each way that keeps within the budget: KL "
        f"from unsteered at most {BUDGET.kl} nats per token on neutral text, repeated 4-grams at most "
        f"{BUDGET.repetition_factor} × unsteered + {BUDGET.repetition_slack}, at least {BUDGET.retention:.0%} of the "
        "questions still right. Effect is the change of the probe gap: the mean log-probability per token of a "
        "probe's positive minus its negative answer, in nats. Measured through the hook on the quantized model, with "
        f"{sizes['probes']} probes, {sizes['passages']} passages, {sizes['questions']} questions and "
        f"{sizes['answers']} answers of {sizes['answer_tokens']} tokens; every position that counts was measured "
        "itself. How: [sweep.md](sweep.md).",
    ]


@dataclass(frozen=True)
class Total:
    """One method over the rows in which it was tried: its effect of both directions, and the default's in those rows.

    A method that a preset does not allow adds 0.
    """

    rows: int
    effect: float
    ours: float

    @classmethod
    def of(cls, rows: Sequence[Row], method: str, what: str) -> Total:
        tried = [row for row in rows if method in row["left_out"] or effect_in(row, method, what) is not None]
        effects = [effect_in(row, method, what) or 0.0 for row in tried]
        return cls(len(tried), sum(effects), sum(effect_in(row, OURS, what) or 0.0 for row in tried))

    @property
    def ratio(self) -> str:
        return f"{self.ours / self.effect:.2f}" if self.effect > 0 else "–"


def effect_in(row: Row, method: str, what: str) -> float | None:
    return next((each[what] for each in row["methods"] if each["method"] == method), None)


def headline(rows: Sequence[Row]) -> list[str]:
    """The sums over presets and models of both directions' effects, and what the default's is in shares of others'."""
    names = dict.fromkeys(
        name for row in rows for name in (*(each["method"] for each in row["methods"]), *row["left_out"])
    )
    whole, far = ({name: Total.of(rows, name, what) for name in names} for what in ("both", "far_both"))
    ratios = [
        f"{whole[name].ratio} × {what} ({far[name].ratio} × where only the divergence is limited)"
        for name, what in ((PUBLISHED, "the published method's"), (RIVAL, "addition's along the same directions"))
        if name in whole
    ]
    lines = [f"**The default's effect is {' and '.join(ratios)}.**", ""] if ratios else []
    lines += [
        "| method | rows | effect of both directions, summed | default : this | KL limited alone | default : this |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(names, key=lambda each: -whole[each].effect):
        cells = [f"{total[name].effect:.2f} | {total[name].ratio}" for total in (whole, far)]
        lines.append(f"| {name} | {whole[name].rows} | {' | '.join(cells)} |")
    where = ", ".join(f"{row['preset']} on {row['model']}" for row in rows)
    return [
        *lines, "",
        f"Rows: {where}. A method that a preset does not allow adds 0; each is compared over the rows that it has.",
    ]  # fmt: skip


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| preset | method | sites | largest − | at | largest + | at | both | range | stopped by "
        "| KL alone: − / + | both |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for each in sorted(row["methods"], key=lambda method: -method["both"]):
            low, high, within = each["negative"], each["positive"], each["range"]
            sign = "" if each["operator"] in ("addition", "ablation") else "°"
            shown = "none" if within is None else f"{within['low']:+g}{sign} … {within['high']:+g}{sign}"
            stops = "" if within is None else f"{within['stopped_low']} / {within['stopped_high']}"
            far = " / ".join(
                f"{each[end]['effect'] or 0.0:+.2f} at {at(each[end], sign)}"
                for end in ("far_negative", "far_positive")
            )
            effects = [f"{end['effect'] or 0.0:+.2f} | {at(end, sign)}" for end in (low, high)]
            lines.append(
                f"| {row['preset']} | {each['method']} | {each['sites']} | {' | '.join(effects)} "
                f"| {each['both']:.2f} | {shown} | {stops} | {far} | {each['far_both']:.2f} |"
            )
    return lines


def at(point: Row, sign: str) -> str:
    return "off" if point["dial"] is None else f"{point['dial']:+g}{sign}"


def promises(rows: Sequence[Row]) -> list[str]:
    lines = [
        "The safe range of the default method as `sweep --write` stores it (two standard errors of the divergence and "
        "one of the repetition must fit as well), given by every other probe, passage, question and answer of a "
        "sweep's sizes; and what the other half of them says at its ends, held to the limits as they stand "
        "(`--promise`).",
        "",
        "| model | preset | range from one half | on the other: KL at its ends | questions | repetition | promise |",
        "|---|---|---|---|---|---|---|",
    ]
    count: dict[str, list[bool]] = {}
    for row in rows:
        for found in row["promise"].values():
            count.setdefault(row["model"], []).append(not found["broken"])
            broken = "; ".join(f"{dial}°: {', '.join(limits)}" for dial, limits in found["broken"].items())
            shown = [
                " / ".join("–" if end[key] is None else format(end[key], form) for end in found["ends"])
                for key, form in (("kl", ".2f"), ("retention", ".1%"), ("repetition", ".2f"))
            ]
            lines.append(
                f"| {row['model']} | {row['preset']} | {found['low']:+g}° … {found['high']:+g}° | {' | '.join(shown)} "
                f"| {broken or 'kept'} |"
            )
    kept = ", ".join(f"{sum(each)} of {len(each)} on {model}" for model, each in count.items())
    return [*lines, "", f"Kept: {kept or 'not checked'}."]


def bars(rows: Sequence[Row], path: Path, title: str) -> None:
    """Both directions' largest effects of every method, preset by preset."""
    found = {each["method"] for row in rows for each in row["methods"]}
    methods = [name for name in METHODS if name in found]
    colours = dict(zip(METHODS, COLOURS, strict=False))  # the same in every picture
    figure = new_figure((2 + 1.5 * len(rows), 4.2))
    axis = figure.subplots()
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        for place, row in enumerate(rows):
            for each in row["methods"]:
                if each["method"] == method:
                    x = place - 0.4 + (number + 0.5) * width
                    ends = [each[side]["effect"] or 0.0 for side in ("negative", "positive")]
                    axis.bar(x, ends[1], width * 0.9, color=colours[method])
                    axis.bar(x, ends[0], width * 0.9, color=colours[method])
        axis.bar(0, 0, color=colours[method], label=method)
    axis.axhline(0, color="#666666", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [row["preset"] for row in rows])
    axis.set_ylabel("largest effect within the budget\n(change of probe gap, nats per token)")
    axis.set_title(title, loc="left", fontsize="medium", parse_math=False)
    axis.legend(frameon=False, fontsize="small", ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.2)
    figure.savefig(path, format="png", dpi=130)


if __name__ == "__main__":
    main()
