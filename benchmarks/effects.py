"""What steering does at equal divergence, on models × presets × methods: effects, texts, and what one preset does to
the others' probes.

    python benchmarks/effects.py                                   # everything; hours on two cores
    python benchmarks/effects.py --models smollm2-135m --presets sentiment
    python benchmarks/effects.py --parts effects                   # one part of it
    python benchmarks/effects.py --page                            # only write the page from what is kept

Every cell is kept in --work as it comes and not measured again: stop it, widen it, run it again. Nothing is measured on
what calibration measured on: of the presets' probes those that choosing sites left, of the neutral passages others than
the dial's.
"""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import gpu_names

from edge_steer.calibration import calibrate
from edge_steer.calibration.cached_recorder import CachedRecorder
from edge_steer.calibration.dial import find_dial
from edge_steer.calibration.engines import NativeEngine
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.calibration.pipeline import CalibrationOptions, calibrate_model
from edge_steer.calibration.site_choice import PROBES as CHOICE_PROBES
from edge_steer.calibration.site_choice import RECORDED_SITES, calibrate_candidates
from edge_steer.errors import SteerError
from edge_steer.fetch import resolve
from edge_steer.measure.divergence import PASSAGES, Divergence
from edge_steer.measure.evaluation_set import pick_evenly
from edge_steer.measure.measured_model import set_dial
from edge_steer.measure.metrics import log_softmax, probe_gaps
from edge_steer.measure.text_quality import repetition
from edge_steer.preset import PRESETS, load_axis, load_preset, neutral_passages, preset_names
from edge_steer.prompts import Probe
from edge_steer.runtime.answer import Sampling
from edge_steer.runtime.chat import generate_answer
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.together import SEQUENCES
from edge_steer.steering import Steering, save_all

MODELS = "smollm2-135m,gemma3-270m,qwen2.5-coder-0.5b,qwen2.5-coder-1.5b"
JUDGE = "qwen2.5-coder-1.5b"
BUDGET = 0.25  # KL from unsteered on neutral text, nats per token, at both ends
PROBES, CROSS_PROBES, TEXTS, LONGEST = 12, 6, 24, 32
TEMPERATURE = 0.8
OURS = "default"
# Rivals: what `calibrate` is asked for. Those of addition are its own best sites, the better one is counted.
RIVALS: dict[str, dict[str, Any]] = {
    "former default": {"plane": "local", "kinds": ("attn_norm",)},
    "addition, attention": {"operator": "addition", "kinds": ("attn_norm",)},
    "addition, stream": {"operator": "addition", "kinds": ("layer_out",)},
    "published": {"plane": "global", "kinds": ("attn_norm", "ffn_norm")},
    "ablation": {"operator": "ablation", "kinds": ("layer_out",)},
}
REFUSAL = re.compile(
    r"(?i)\b(i'?m sorry,? but|i am sorry,? but|i can(?:'|no)t (?:assist|help|provide|fulfil)|"
    r"i'?m (?:not able|unable) to)"
)
Cell = dict[str, Any]


@click.command()
@click.option("--models", default=MODELS, show_default=True)
@click.option("--presets", default=",".join(preset_names()), show_default=True)
@click.option("--parts", default="effects,texts,sampled,cross,candidates", show_default=True)
@click.option("--work", default="benchmarks/measured/effects", show_default=True, help="Where measurements are kept.")
@click.option("--threads", default=2, show_default=True)
@click.option("--gpu-layers", default=0, show_default=True, help="Layers on a GPU; -1 is all.")
@click.option("--page", is_flag=True, help="Measure nothing; write the page.")
def main(models: str, presets: str, parts: str, work: str, threads: int, gpu_layers: int, page: bool) -> None:
    """Measure, and write the page."""
    top = Path(work)
    run = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads, "n_gpu_layers": gpu_layers}
    measure: dict[str, Callable[[str, str, Path, dict[str, Any]], None]] = {
        "effects": effects, "texts": texts, "sampled": sampled, "cross": cross, "candidates": candidates,
    }  # fmt: skip
    for part in [] if page else parts.split(","):
        for preset in presets.split(","):
            for model in models.split(","):
                folder = top / model / preset
                folder.mkdir(parents=True, exist_ok=True)
                measure[part](model, preset, folder, run)
    from effects_page import write_page

    write_page(top)


def print_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- steerings --------------------------------------------------------------------------------------------------------


def steerings_of(model: str, preset: str, folder: Path, run: dict[str, Any]) -> list[Steering]:
    """Our default as `calibrate` makes it, and the rivals that the preset allows; calibrate_model once."""
    kept = folder / "steerings.gguf"
    if kept.exists():
        return Steering.load_all(kept)
    print_note(f"{model}, {preset}: calibrating")
    prompts, path = load_preset(preset), resolve(model, fetch=True)
    axes = () if preset == "refusal" else None
    made = [calibrate_model(NativeEngine(str(path), run), prompts, CalibrationOptions(orthogonal_to=axes), name=OURS)]
    with closing(NativeRecorder(path, sites=RECORDED_SITES, **run)) as recorder:
        remembered = CachedRecorder(recorder)
        for name, how in RIVALS.items():
            try:
                made.append(calibrate(remembered, prompts, name=name, **how))
            except SteerError as error:
                print_note(f"  {name} is left out: {error}")
    save_all(made, kept, force=True)
    return made


def open_steered(model: str, steerings: Sequence[Steering], run: dict[str, Any]) -> SteeredLlama:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*overlap")
        return SteeredLlama(
            resolve(model, fetch=True), steering=steerings, angles={each.name: None for each in steerings},
            engine="hook", sequences=SEQUENCES, **run,
        )  # fmt: skip


def held_out_probes(preset: str, count: int) -> tuple[Probe, ...]:
    """Probes of the preset that choosing sites does not measure on."""
    probes = load_preset(preset).probes
    used = set(pick_evenly(probes, CHOICE_PROBES))
    return pick_evenly([probe for probe in probes if probe not in used], count)


def held_out_passages() -> tuple[str, ...]:
    """Neutral passages that measuring the dial does not use."""
    passages = neutral_passages()
    used = set(pick_evenly(passages, PASSAGES))
    return pick_evenly([each for each in passages if each not in used], PASSAGES)


# --- effects ----------------------------------------------------------------------------------------------------------


def effects(model: str, preset: str, folder: Path, run: dict[str, Any]) -> None:
    """Each method's dials at the budget, and the change of the probe gap at both; a system prompt beside them."""
    file = folder / "effects.json"
    found: Cell = json.loads(file.read_text()) if file.exists() else {}
    steerings = steerings_of(model, preset, folder, run)
    missing = [each for each in steerings if each.name not in found]
    if not missing and "system prompt" in found:
        return
    probes, names = held_out_probes(preset, PROBES), load_preset(preset)
    with closing(open_steered(model, steerings, run)) as llm:
        divergence = Divergence(llm, held_out_passages())
        set_dial(llm, None, None)
        off = probe_gaps(llm, probes)
        for steering in missing:
            found[steering.name] = {"sites": sites_of(steering)} | {
                side: end(llm, divergence, steering, probes, off, sign)
                for side, sign in (("negative", -1), ("positive", 1))
            }
            file.write_text(json.dumps(found, indent=1))
            print_note(f"{model}, {preset}, {steering.name}: {found[steering.name]}")
        set_dial(llm, None, None)
        asked = {
            side: probe_gaps(llm, probes, f"Your answers are always {name}. Answer in a {name} way.") - off
            for side, name in (("negative", names.negative_name), ("positive", names.positive_name))
        }
        found["system prompt"] = {side: {"dial": None, "kl": None, **mean_of(change)} for side, change in asked.items()}
    file.write_text(json.dumps(found, indent=1))


def end(
    llm: SteeredLlama, divergence: Divergence, steering: Steering, probes: Sequence[Probe], off: Any, sign: int
) -> Cell:
    if steering.operator == "ablation":
        if sign < 0:
            return {"dial": None, "kl": None, "effect": 0.0, "error": 0.0}
        dial, kl = 1.0, divergence.at(steering.name, 1.0)
    else:
        near = steering.angle_max if sign > 0 else -steering.angle_min
        at = find_dial(divergence, steering, sign, target=BUDGET, first=None if math.isnan(near) else 2 * near)
        dial, kl = at.angle, at.kl
    set_dial(llm, steering.name, dial)
    return {"dial": dial, "kl": kl, **mean_of(probe_gaps(llm, probes) - off)}


def mean_of(change: Any) -> Cell:
    return {"effect": float(change.mean()), "error": float(change.std(ddof=1) / math.sqrt(len(change)))}


def sites_of(steering: Steering) -> str:
    if steering.made.candidates:
        without = " or ".join(steering.made.orthogonal_to)
        return steering.made.candidates[0] + (f", no {without}" if without else "")
    kinds = sorted({site.kind for site in steering.steered})
    return f"{'+'.join(kinds)} {steering.plane}"


# --- texts ------------------------------------------------------------------------------------------------------------


def texts(model: str, preset: str, folder: Path, run: dict[str, Any]) -> None:
    """Greedy answers to held-out prompts at both ends of the budget, at half, and off; then the judge's log-odds."""
    judge_texts(model, preset, folder, run, "texts", {"-1": -1.0, "-1/2": -0.5, "0": None, "+1/2": 0.5, "+1": 1.0}, 0.0)


def sampled(model: str, preset: str, folder: Path, run: dict[str, Any]) -> None:
    """The same, sampled, at both ends and off; the i-th prompt's seed is i."""
    judge_texts(model, preset, folder, run, "sampled", {"-1": -1.0, "0": None, "+1": 1.0}, TEMPERATURE)


def judge_texts(
    model: str, preset: str, folder: Path, run: dict[str, Any], name: str, shares: dict[str, float | None], heat: float
) -> None:
    """Answers at shares of the budget's dials, and what the judge finds, kept in the file `name`. heat: of sampling."""
    file, ends = folder / f"{name}.json", folder / "effects.json"
    found: Cell = json.loads(file.read_text()) if file.exists() else {}
    if "judged" in found or not ends.exists():
        return
    prompts = pick_evenly((PRESETS / "open_ended.txt").read_text(encoding="utf-8").splitlines(), TEXTS)
    if "texts" not in found:
        ours = json.loads(ends.read_text())[OURS]
        steering = next(each for each in steerings_of(model, preset, folder, run) if each.name == OURS)
        dials = {
            at: share and abs(share) * ours["negative" if share < 0 else "positive"]["dial"]
            for at, share in shares.items()
        }
        with closing(open_steered(model, [steering], run)) as llm:
            found["texts"] = {at: write_answers(llm, dial, prompts, heat) for at, dial in dials.items()}
        file.write_text(json.dumps(found, indent=1))
    with closing(open_steered(JUDGE, [], run)) as judge:
        found["judged"] = {
            name: [score(judge, preset, prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
            for name, answers in found["texts"].items()
        }
    found["refusals"] = {
        name: sum(bool(REFUSAL.search(each)) for each in all_) for name, all_ in found["texts"].items()
    }
    found["repetition"] = {
        name: float(np.mean([repetition(each) for each in all_])) for name, all_ in found["texts"].items()
    }
    if run["n_gpu_layers"]:
        found["where"] = gpu_names()
    file.write_text(json.dumps(found, indent=1))
    print_note(f"{model}, {preset}, {name}: " + str({at: positive(scores) for at, scores in found["judged"].items()}))


def write_answers(llm: SteeredLlama, dial: float | None, prompts: Sequence[str], heat: float) -> list[str]:
    set_dial(llm, OURS, dial)
    how = Sampling(max_tokens=LONGEST, repeat_penalty=1.0, temperature=heat)
    return [
        generate_answer(llm, [{"role": "user", "content": prompt}], replace(how, seed=seed)).text
        for seed, prompt in enumerate(prompts)
    ]


def score(judge: SteeredLlama, preset: str, prompt: str, text: str) -> float:
    """How much surer the judge is that an answer is like the positive end than like the negative: the difference of two
    log-odds of yes over no. Refusals are judged by what they are."""
    about = load_preset(preset)
    head = f"An assistant was asked: {prompt}\nIt answered: {text or '(nothing)'}\n\n"
    odds = []
    for name in (about.positive_name, about.negative_name):
        question = f"{head}Is the tone of this answer {name}? Say yes or no."
        tokens = judge.chat_tokens([{"role": "user", "content": question}])
        row = log_softmax(judge.logits([*tokens, tokens[0]], len(tokens)))[0]
        yes, no = (np.logaddexp.reduce([row[judge.text_tokens(word)[-1]] for word in words])
                   for words in (("yes", "Yes"), ("no", "No")))  # fmt: skip
        odds.append(float(yes - no))
    return round(odds[0] - odds[1], 4)


def positive(scores: Sequence[float]) -> float:
    """The share of answers judged nearer to the positive end."""
    return round(float(np.mean(np.array(scores) > 0)), 3)


# --- what a preset does to the others' probes -------------------------------------------------------------------------


def cross(model: str, preset: str, folder: Path, run: dict[str, Any]) -> None:
    """The change of every preset's probe gap from the negative end of ours to the positive, at the budget."""
    file, ends = folder / "cross.json", folder / "effects.json"
    if file.exists() or not ends.exists():
        return
    ours = json.loads(ends.read_text())[OURS]
    steering = next(each for each in steerings_of(model, preset, folder, run) if each.name == OURS)
    found = {}
    with closing(open_steered(model, [steering], run)) as llm:
        for other in preset_names():
            probes = held_out_probes(other, CROSS_PROBES)
            gaps = []
            for side in ("negative", "positive"):
                set_dial(llm, OURS, ours[side]["dial"])
                gaps.append(float(probe_gaps(llm, probes).mean()))
            found[other] = gaps[1] - gaps[0]
    file.write_text(json.dumps(found, indent=1))
    print_note(f"{model}, {preset}, cross: {found}")


# --- was the quick choice right ---------------------------------------------------------------------------------------


def candidates(model: str, preset: str, folder: Path, run: dict[str, Any]) -> None:
    """Every candidate at the budget, on what calibration did not measure on."""
    file = folder / "candidates.json"
    if file.exists() or not (folder / "effects.json").exists():
        return
    ours = next(each for each in steerings_of(model, preset, folder, run) if each.name == OURS)
    axes = [load_axis(name) for name in ours.made.orthogonal_to]
    with closing(NativeRecorder(resolve(model, fetch=True), sites=RECORDED_SITES, **run)) as recorder:
        made = calibrate_candidates(
            CachedRecorder(recorder), load_preset(preset), orthogonal_to=axes, step=lambda _: None, note=print_note
        )
    probes, found = held_out_probes(preset, PROBES), {}
    with closing(open_steered(model, list(made.values()), run)) as llm:
        divergence = Divergence(llm, held_out_passages())
        set_dial(llm, None, None)
        off = probe_gaps(llm, probes)
        for candidate, steering in made.items():
            ends = [end(llm, divergence, steering, probes, off, sign) for sign in (-1, 1)]
            found[candidate.name] = ends[1]["effect"] - ends[0]["effect"]
    file.write_text(json.dumps(found, indent=1))
    print_note(f"{model}, {preset}, candidates: {found}")


if __name__ == "__main__":
    main()
