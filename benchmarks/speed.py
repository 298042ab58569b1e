"""What steering costs: prompts, generation, whole answers and calibration against the same without steering.

python benchmarks/speed.py --results docs/results.md   # two small models, two shapes with random weights; 15 minutes
python benchmarks/speed.py --gpu-layers -1             # on a GPU
python benchmarks/speed.py --quick                     # SmolLM2-135M alone, without torch, in 2
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import click
import llama_cpp
from machine import gpu_names
from page import write_part
from timing import answers, calibration, decoding, shapes
from timing.picture import draw
from timing.rounds import Row, Times, rounds_of, shares, table
from timing.several import several_rows

import edge_steer
from edge_steer.fetch import resolve
from edge_steer.steering import Steering

SMALL, STREAM = "smollm2-135m", "qwen2.5-coder-0.5b"
MODELS = {
    SMALL: "SmolLM2-135M-Instruct, Q4_1",
    STREAM: "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M: the residual stream",
    "1b": "Llama-3.2-1B's shape, random weights, Q4_0",
    "3b": "Llama-3.2-3B's shape, random weights, Q4_0",
    "8b": "Llama-3.1-8B's shape, random weights, Q4_0",
}
DEFAULT = (SMALL, STREAM, "1b", "3b")
PICTURE = "speed.png"
HOW = """\
Medians over interleaved, shuffled rounds. A share is a row's speed over that of its baseline in the same round, with
its bootstrap 95% interval; a limit is met where the interval reaches it. What can be toggled is toggled inside one
context: the hook's rows against `unsteered` (the same context, its callback fields null), adapters and the control
vector against `control`, the plain context they are switched on in. The control's share shows how far two equal
contexts are apart."""


@click.command()
@click.option("--models", default=",".join(DEFAULT), show_default=True)
@click.option("--minutes", default=7.0, show_default=True, help="For the models' main tables; the rest comes on top.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of every row, instead of as many as fit in --minutes.")
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--gpu-layers", default=0, show_default=True, help="Layers on a GPU, -1 is all; then the main tables alone."
)
@click.option("--quick", is_flag=True, help="SmolLM2-135M alone, few rounds, without torch.")
@click.option(
    "--results", type=click.Path(path_type=Path), help="The page to write them into; a picture goes beside it."
)
def main(
    models: str, minutes: float, rounds: int | None, threads: int, gpu_layers: int, quick: bool, results: Path | None
) -> None:
    """Print the tables, in Markdown."""
    chosen = [SMALL] if quick else models.split(",")
    if unknown := set(chosen) - set(MODELS):
        raise click.UsageError(f"expected models among {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    page = [f"## Speed\n\n`{' '.join(['python', *sys.argv])}`\n\n{setting(threads, gpu_layers)}\n\n{HOW}"]
    if results and not gpu_layers:
        page += [f"![Speed as a share of unsteered]({PICTURE})"]
    measured: dict[str, tuple[Sequence[Row], Times]] = {}
    seconds = 60 * (0.8 if quick else minutes) / len(chosen)
    for name in chosen:
        if gpu_layers:
            page += gpu_page(name, threads, gpu_layers, seconds, rounds)
        else:
            told, measured[MODELS[name]] = model_page(name, threads, seconds, rounds, quick=quick)
            page += told
    text = "\n\n".join(page)
    click.echo(text)
    if results:
        write_part(results, "speed.py on a GPU" if gpu_layers else "speed.py", text)
    if measured and results:
        draw(results.parent / PICTURE, measured, decoding.METRICS)


def gpu_page(name: str, threads: int, layers: int, seconds: float, rounds: int | None) -> list[str]:
    """The main table of one model on a GPU."""
    with ExitStack() as stack:
        rows = decoding.Contexts(model_path(name), threads, layers, stack).gpu_rows()
        times = timed(MODELS[name], rows, rounds, seconds)
    return [
        f"### {MODELS[name]}",
        *section("Prompts, then more tokens", rows, times, decoding.METRICS),
        control_line(times),
    ]


def model_path(name: str) -> Path:
    return resolve(name, fetch=True) if name in (SMALL, STREAM) else shapes.build(name)


def model_page(
    name: str, threads: int, seconds: float, rounds: int | None, *, quick: bool
) -> tuple[list[str], tuple[Sequence[Row], Times]]:
    """The tables of one model; and the rows and times of the first."""
    small = name == SMALL
    path = model_path(name)
    page = [f"### {MODELS[name]}"]
    with ExitStack() as stack:
        contexts = decoding.Contexts(path, threads, 0, stack)
        limits = (0.99, 0.97) if small else (0.995, 0.995)
        rows = contexts.stream_rows(0.99) if name == STREAM else contexts.rows(*limits, brief=name == "3b")
        times = timed(MODELS[name], rows, rounds, seconds)
        page += section("Prompts, then more tokens", rows, times, decoding.METRICS)
        page += [control_line(times)]
        if name in (SMALL, STREAM):
            told = several_rows(contexts)
            found = timed("several steerings", told, rounds, 15 if quick else 60)
            page += section("Several steerings, and dials that move", told, found, decoding.METRICS)
            page += [control_line(found)]
        if small:
            told = answers.answer_rows(contexts)
            found = timed("answers", told, rounds, 15 if quick else 60)
            page += section(f"Whole answers of {answers.TOKENS} tokens, streamed as text", told, found, answers.METRICS)
        steerings = contexts.steerings[:2]
    if small:
        recording = calibration.recording_rows(path, threads)
        recorded = timed("calibration", recording, rounds or (3 if quick else 10), 0)
    if not quick and name in (SMALL, "1b"):  # the 3b in bfloat16 takes 6 GB, and minutes a round
        slow, found = torch_times(name, path, threads, steerings)
        page += section("The same in transformers", [rows[0], *slow["transformers"]], times | found, decoding.METRICS)
        page += [f"transformers generates {torch_rows().GENERATED} tokens, not {decoding.GENERATED}."]
        if small:
            recording, recorded = recording + slow["recorder"], recorded | found
    if small:
        title = f"Calibration: rounds of {calibration.PROMPTS} prompts"
        page += section(title, recording, recorded, calibration.METRICS)
    return page, (rows, times)


def torch_rows() -> ModuleType:
    """What needs torch, imported after llama.cpp was timed: two thread pools in one process disturb each other."""
    from timing import transformers_rows

    return transformers_rows


def torch_times(
    name: str, path: Path, threads: int, steerings: Sequence[Steering]
) -> tuple[dict[str, list[Row]], Times]:
    """Rows of torch on this model, two rounds on the small one; llama.cpp's contexts are closed by now."""
    torch_side = torch_rows()
    torch_side.use_threads(threads)
    found: Times = {}
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="edge-steer-") as folder:
        if name == SMALL:
            torch_side.directory_of(path, Path(folder))
            rows["recorder"] = calibration.torch_recording_rows(Path(folder))
            found |= timed("torch recorder", rows["recorder"], 2, 0)
            model, what = torch_side.loaded(Path(folder)), "float32"
        else:
            model, what = torch_side.of_shape(shapes.SHAPES[name]), "bfloat16"
            steerings = steerings[:1]
        rows["transformers"] = torch_side.transformers_rows(model, what, steerings, decoding.PLAIN)
        found |= timed("transformers", rows["transformers"], 2 if name == SMALL else 1, 0)
    return rows, found


def control_line(times: Times) -> str:
    """Whether the control's interval holds 1, without which a limit met or missed says little."""
    found = shares(decoding.CONTROL, decoding.PLAIN, times, decoding.METRICS)
    held = [f"{metric} {'yes' if share.low <= 1 <= share.high else '**no**'}" for metric, share in found.items()]
    return f"The control's interval holds 1: {', '.join(held)}."


def timed(what: str, rows: Sequence[Row], rounds: int | None, seconds: float) -> Times:
    note(f"{what}: {len(rows)} rows")
    return rounds_of(rows, rounds=rounds, seconds=seconds, note=note)


def section(title: str, rows: Sequence[Row], times: Times, metrics: Mapping[str, str]) -> list[str]:
    counts = sorted({len(times[row.name]) for row in rows})
    return [f"#### {title}", f"Rounds: {' or '.join(map(str, counts))}.", "\n".join(table(rows, times, metrics))]


def setting(threads: int, gpu_layers: int) -> str:
    """When, where and with what."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on = f"{gpu_layers} layers on {gpu_names()}, " if gpu_layers else ""
    return (
        f"{on}{datetime.date.today()}, {processor}, {cores} cores, {platform.system()} {platform.machine()}, "
        f"{threads} threads, edge-steer {edge_steer.__version__}, llama-cpp-python {llama_cpp.__version__}."
    )


def note(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
