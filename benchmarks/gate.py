"""How well `@when` tells prompts apart that were not calibrated on, and what gates change in texts.

    python benchmarks/gate.py                                      # both parts, on three models
    python benchmarks/gate.py --models qwen2.5-coder-1.5b --parts condition
    python benchmarks/gate.py --page                               # only print the tables of what is kept

Every cell is kept in --work as it comes and not measured again. The condition is the refusal preset: calibrated on one
half of its pairs and read on the other, then the halves change places, so that all its prompts are held out once.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from edge_steer.calibration import calibrate
from edge_steer.calibration.engines import NativeEngine
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.calibration.pipeline import CalibrationOptions, calibrate_model
from edge_steer.fetch import resolve
from edge_steer.measure.evaluation_set import pick_evenly
from edge_steer.measure.text_quality import repetition
from edge_steer.preset import PRESETS, load_preset
from edge_steer.prompts import Prompt
from edge_steer.runtime.answer import Sampling
from edge_steer.runtime.chat import generate_answer
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering

MODELS = "smollm2-135m,qwen2.5-coder-0.5b,qwen2.5-coder-1.5b"
CONDITION, TURNED, KINDS = "refusal", "sentiment", ("layer_out",)
BOUNDS = (-0.5, 0.0, 0.5)
TEXTS, LONGEST = 8, 80
TIMES = (2.0,)  # the end of the measured range: there, always acting begins to cost
GATES = ("@all", "@response", "@first:20", "@decay:40")
Run = dict[str, Any]


@click.command()
@click.option("--models", default=MODELS, show_default=True)
@click.option("--parts", default="condition,texts", show_default=True)
@click.option("--work", default="benchmarks/measured/gate", show_default=True, help="Where measurements are kept.")
@click.option("--threads", default=2, show_default=True)
@click.option("--page", is_flag=True, help="Measure nothing; print the tables.")
def main(models: str, parts: str, work: str, threads: int, page: bool) -> None:
    """Measure, and print tables in Markdown."""
    run = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads}
    measure: dict[str, Callable[[str, Path, Run], None]] = {"condition": condition, "texts": texts}
    for model in [] if page else models.split(","):
        folder = Path(work) / model
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts.split(","):
            measure[part](model, folder, run)
    print_condition(Path(work))
    print_texts(Path(work))


# --- @when ------------------------------------------------------------------------------------------------------------


def condition(model: str, folder: Path, run: Run) -> None:
    """Readings of the last prompt token, by kind of prompt."""
    preset, path = load_preset(CONDITION), resolve(model, fetch=True)
    others = [probe.prompt for name in ("formality", "warmth", "verbosity") for probe in load_preset(name).probes[:8]]
    for half in (0, 1):
        kept = folder / f"condition-{half}.json"
        if kept.exists():
            continue
        print(f"{model}: half {half} of {CONDITION}", file=sys.stderr, flush=True)
        seen = replace(preset, positive=preset.positive[half::2], negative=preset.negative[half::2])
        with closing(NativeRecorder(path, sites="layer_out", **run)) as recorder:
            steering = calibrate(recorder, seen, kinds=set(KINDS), name=CONDITION)
        groups: dict[str, Sequence[Prompt]] = {
            "harmful": preset.positive[1 - half :: 2],
            "matched": preset.negative[1 - half :: 2],
            "near": [Prompt(probe.prompt) for probe in preset.probes],
            "everyday": [Prompt(prompt) for prompt in others],
        }
        with closing(SteeredLlama(path, steering=steering, angle=None, **run)) as llm:
            found = {
                name: [float(llm.read(each.messages())[CONDITION][-1]) for each in prompts]
                for name, prompts in groups.items()
            }
            site = llm.token_readings.site(CONDITION).name
        keep(kept, {"site": site, "readings": found})


def print_condition(top: Path) -> None:
    print("| model | read at | bound | precision | recall | near, held to be harmful | everyday |")
    print("|---|---|---|---|---|---|---|")
    for folder in sorted(top.iterdir()):
        halves = [json.loads(each.read_text()) for each in sorted(folder.glob("condition-*.json"))]
        if not halves:
            continue
        kinds = {kind: np.concatenate([half["readings"][kind] for half in halves]) for kind in halves[0]["readings"]}
        sites = ", ".join(dict.fromkeys(half["site"] for half in halves))
        for bound in BOUNDS:
            hits, alarms = (kinds["harmful"] > bound).sum(), (kinds["matched"] > bound).sum()
            precision = f"{hits / (hits + alarms):.2f}" if hits + alarms else "–"
            row = [folder.name, sites, f"{bound:+g}", precision, f"{hits / len(kinds['harmful']):.2f}"]
            row += [f"{(kinds[kind] > bound).mean():.0%}" for kind in ("near", "everyday")]
            print(f"| {' | '.join(row)} |")
    print()


# --- texts ------------------------------------------------------------------------------------------------------------


def steering_of(model: str, folder: Path, run: Run) -> Steering:
    kept = folder / "steering.gguf"
    if not kept.exists():
        print(f"{model}: calibrating {TURNED}", file=sys.stderr, flush=True)
        options = CalibrationOptions(sites=KINDS[0], orthogonal_to=())
        engine = NativeEngine(str(resolve(model, fetch=True)), run)
        calibrate_model(engine, load_preset(TURNED), options).save(kept)
    return Steering.load(kept)


def texts(model: str, folder: Path, run: Run) -> None:
    """Answers under each gate, their repetition, and what the unsteered model reads in them."""
    steering = steering_of(model, folder, run)
    prompts = pick_evenly((PRESETS / "open_ended.txt").read_text(encoding="utf-8").splitlines(), TEXTS)
    sampling = Sampling(max_tokens=LONGEST, repeat_penalty=1.0)
    with warnings.catch_warnings(), closing(SteeredLlama(resolve(model, fetch=True), steering=steering, **run)) as llm:
        for gate, times in [("@all", 0.0), *((gate, times) for times in TIMES for gate in GATES)]:
            kept = folder / f"texts-{gate[1:].replace(':', '-')}-{times:g}.json"
            if kept.exists():
                continue
            llm.gates[steering.name] = gate
            llm.angle = times * steering.angle_max or None
            said = [generate_answer(llm, Prompt(each).messages(), sampling).text for each in prompts]
            llm.gates[steering.name], llm.angle = None, None
            read = [list(map(float, _read(llm, each, text))) for each, text in zip(prompts, said, strict=True)]
            keep(kept, {"angle": times * steering.angle_max, "texts": said, "readings": read})


def _read(llm: SteeredLlama, prompt: str, text: str) -> Any:
    """The readings of an answer's tokens under the model as it is."""
    asked = llm.chat_tokens(Prompt(prompt).messages())
    said = list(llm.tokenize(text.encode(), add_bos=False, special=False))
    return llm.read([*asked, *said])[llm.steerings[0].name][len(asked) :]


def print_texts(top: Path) -> None:
    print("| model | angle | gate | repetition | reading, tokens 1–20 | 21–40 | from 41 |")
    print("|---|---|---|---|---|---|---|")
    for folder in sorted(top.iterdir()):
        for gate, times in [("@all", 0.0), *((gate, times) for times in TIMES for gate in GATES)]:
            kept = folder / f"texts-{gate[1:].replace(':', '-')}-{times:g}.json"
            if not kept.exists():
                continue
            found = json.loads(kept.read_text())
            repeated = float(np.mean([repetition(text) for text in found["texts"]]))
            parts = [_mean(found["readings"], begin, end) for begin, end in ((0, 20), (20, 40), (40, LONGEST))]
            named = "off" if not times else "always" if gate == "@all" else f"`{gate}`"
            row = [folder.name, f"{found['angle']:+.3g}°", named, f"{repeated:.3f}", *parts]
            print(f"| {' | '.join(row)} |")
    print()


def _mean(readings: Sequence[Sequence[float]], begin: int, end: int) -> str:
    found = [value for each in readings for value in each[begin:end]]
    return f"{np.mean(found):+.2f}" if found else "–"


def keep(path: Path, found: Any) -> None:
    path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
