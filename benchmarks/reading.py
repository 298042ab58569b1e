"""How well a reading tells a preset's two classes apart, on prompts that calibration did not see.

    python benchmarks/reading.py                       # three small models, all presets; goes on where it was left
    python benchmarks/reading.py --models qwen2.5-coder-1.5b --threads 8
    python benchmarks/reading.py --table               # the tables of docs/reading.md from what is measured

Of the prompts, every fourth pair is held out in turn, and a steering is made from the others. Of the probes, which no
direction is made from, both answers are read as bare texts by the steering of all prompts. Each text's score is the
reading of its last token, or the mean over its tokens but the first; the number is the area under the ROC curve: the
share of pairs of a positive and a negative text in which the positive one scores higher.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from edge_steer.calibration import calibrate
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.calibration.sums import ClassSums, Step
from edge_steer.fetch import resolve
from edge_steer.preset import load_preset, preset_names
from edge_steer.prompts import Prompt, PromptSet
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.reading import read_site
from edge_steer.steering import Steering

FOLDS = 4
KINDS = ("attn_norm", "layer_out")
MODELS = "smollm2-135m,gemma3-270m,qwen2.5-coder-0.5b"
MEASURED = Path(__file__).parent / "measured" / "reading"


class Recorded:
    """A Recorder that has recorded two sides of at most KEPT prompts, and adds up whichever of them are asked for."""

    def __init__(self, recorder: NativeRecorder, prompts: PromptSet) -> None:
        self.name, self.base, self.sites = recorder.name, recorder.base, recorder.sites
        self._rows: dict[Prompt, NDArray[np.float32]] = {}
        for side in (prompts.positive, prompts.negative):
            found = recorder.sums(side, lambda _: None)
            self._rows |= dict(zip(side, found.rows, strict=True))
            self._sink = found.sink  # every prompt begins with the same token

    def sums(self, prompts: Sequence[Prompt], step: Step) -> ClassSums:
        return replace(ClassSums.of(np.stack([self._rows[prompt] for prompt in prompts])), sink=self._sink)


def area(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Area under the ROC curve; a tie counts half."""
    above = np.sign(np.subtract.outer(np.asarray(positive), np.asarray(negative)))
    return float((above.mean() + 1) / 2)


def fold(prompts: PromptSet, number: int | None) -> PromptSet:
    """The prompts without the pairs of fold `number`; None: all."""
    kept = [i for i in range(len(prompts.positive)) if number is None or i % FOLDS != number]
    sides = (tuple(side[i] for i in kept) for side in (prompts.positive, prompts.negative))
    return PromptSet(prompts.name, prompts.description, "positive", "negative", *sides)


def steerings_of(recorder: Recorded, prompts: PromptSet) -> dict[str, Steering]:
    """By kind of site and fold: `layer_out 2`; those of all prompts are `layer_out all`."""
    return {
        (name := f"{kind} {'all' if number is None else number}"): calibrate(
            recorder, fold(prompts, number), kinds=[kind], mask="all", name=name
        )
        for kind in KINDS
        for number in (*range(FOLDS), None)
    }


def scores(llm: SteeredLlama, tokens: Sequence[int], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Last and mean reading of a text, by steering's name. The first token is the attention sink, whatever it is."""
    found: dict[str, NDArray[np.float32]] = llm.read(tokens, names)
    return {name: {"last": float(each[-1]), "mean": float(each[1:].mean())} for name, each in found.items()}


def measure(path: Path, preset: str, run: dict[str, Any]) -> dict[str, Any]:
    """Areas by kind of site, by texts (held-out prompts, answers of probes), by score."""
    prompts = load_preset(preset)
    recorder = NativeRecorder(path, sites="pre,layer_out", **run)
    steerings = steerings_of(Recorded(recorder, prompts), prompts)
    recorder.close()
    llm = SteeredLlama(path, steering=list(steerings.values()), angles=dict.fromkeys(steerings), **run)
    read: dict[tuple[str, str, str], tuple[list[float], list[float]]] = {}

    def note(texts: str, side: int, tokens: Sequence[int], which: str) -> None:
        for name, values in scores(llm, tokens, [f"{kind} {which}" for kind in KINDS]).items():
            for score, value in values.items():
                read.setdefault((name.split()[0], texts, score), ([], []))[side].append(value)

    for side, given in enumerate((prompts.positive, prompts.negative)):
        for number, prompt in enumerate(given):
            tokens = llm.text_tokens(llm.chat_template.prompt_text(prompt))
            note("held-out prompts", side, tokens, str(number % FOLDS))
    for probe in prompts.probes:
        for side, text in enumerate((probe.positive, probe.negative)):
            note("answers", side, llm.text_tokens(text), "all")
    llm.close()
    areas: dict[str, Any] = {}
    for (kind, texts, score), sides in read.items():
        areas.setdefault(kind, {}).setdefault(texts, {})[score] = round(area(*sides), 4)
    return {"sites": {kind: read_site(steerings[f"{kind} all"]).name for kind in KINDS}, "areas": areas}


def rows(models: Iterable[str]) -> Iterable[str]:
    """A Markdown table per model that has been measured."""
    columns = [(texts, score) for texts in ("held-out prompts", "answers") for score in ("last", "mean")]
    for model in models:
        found = {path.stem: json.loads(path.read_text()) for path in sorted((MEASURED / model).glob("*.json"))}
        if not found:
            continue
        yield f"\n**{model}**\n"
        yield "| preset | read at | " + " | ".join(f"{texts}, {score}" for texts, score in columns) + " |"
        yield "|---|---|" + "---|" * len(columns)
        for preset, each in found.items():
            for kind in KINDS:
                cells = [f"{each['areas'][kind][texts][score]:.2f}" for texts, score in columns]
                yield f"| {preset} | {each['sites'][kind]} | " + " | ".join(cells) + " |"


@click.command()
@click.option("--models", default=MODELS, show_default=True)
@click.option("--presets", default=",".join(preset_names()), show_default=True)
@click.option("--threads", type=int, help="Threads.  [default: llama-cpp-python's]")
@click.option("--table", is_flag=True, help="Only print what has been measured.")
def main(models: str, presets: str, threads: int | None, table: bool) -> None:
    """Measure what is not measured yet, and print a Markdown table per model."""
    warnings.simplefilter("ignore", UserWarning)  # steerings of one preset overlap
    run = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads}
    for model in models.split(",") if not table else ():
        path = resolve(model, fetch=True)
        for preset in presets.split(","):
            to = MEASURED / model / f"{preset}.json"
            if not to.exists():
                found = measure(path, preset, run)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_text(json.dumps(found, indent=1) + "\n")
                click.echo(f"{model} {preset}: {json.dumps(found['areas'])}", err=True)
    click.echo("\n".join(rows(models.split(","))))


if __name__ == "__main__":
    main()
