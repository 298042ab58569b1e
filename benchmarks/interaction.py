"""Two steerings at once, 2 × 2: what each does alone, both side by side; and what `a + b` and `a ~ b` do.

    python benchmarks/interaction.py                       # two models, two pairs; some minutes each on one core
    python benchmarks/interaction.py --page                # only write the page from what is kept

Both dials stand at their defaults. Measured on the probes and neutral passages that calibration did not measure on.
Every cell is kept in --work and not measured again. The steerings are those of the set that ships.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import click
from effects import held_out_passages, held_out_probes, open_steered
from page import write_part

from edge_steer import SteerError, combine
from edge_steer.measure.divergence import Divergence
from edge_steer.measure.metrics import probe_gaps
from edge_steer.sharing.find import find_steerings

PAGE = Path(__file__).parent.parent / "docs" / "composing.md"
MODELS = "smollm2-135m,qwen2.5-coder-0.5b"
PAIRS = "sentiment+warmth,sentiment+formality"
PROBES = 12
MADE = {"sum": "+", "without": "~"}
Cell = dict[str, Any]


@click.command()
@click.option("--models", default=MODELS, show_default=True)
@click.option("--pairs", default=PAIRS, show_default=True)
@click.option("--work", default="benchmarks/measured/interaction", show_default=True, help="Where cells are kept.")
@click.option("--threads", default=2, show_default=True)
@click.option("--page", is_flag=True, help="Measure nothing; write the page.")
def main(models: str, pairs: str, work: str, threads: int, page: bool) -> None:
    """Measure, and write the page."""
    cells = []
    for model in models.split(","):
        for pair in pairs.split(","):
            file = Path(work) / model / f"{pair}.json"
            if not page:
                file.parent.mkdir(parents=True, exist_ok=True)
                measure(model, pair.split("+"), threads, file)
            cell = json.loads(file.read_text()) if file.exists() else {"settings": {}}
            if {"first", "second", "both"} <= cell["settings"].keys():
                cells.append((model, cell))
    write_part(PAGE, "interaction.py", section(cells))


def measure(model: str, pair: list[str], threads: int, file: Path) -> None:
    """The change of both presets' probe gaps and the divergence on neutral text, under each setting `file` lacks."""
    found: Cell = json.loads(file.read_text()) if file.exists() else {"pair": pair, "settings": {}}
    one, other = (find_steerings(name, model)[0] for name in pair)
    settings = {"first": [one], "second": [other], "both": [one, other]}
    for name, sign in MADE.items():
        try:
            settings[name] = [combine(f"{pair[0]} {sign} {pair[1]}", [one, other], name=name)]
        except SteerError as error:
            print(f"{model}, {'+'.join(pair)}, {name} is left out: {error}", file=sys.stderr, flush=True)
    missing = {name: on for name, on in settings.items() if name not in found["settings"]}
    if not missing:
        return
    steerings = {each.name: each for on in missing.values() for each in on}
    run = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads}
    with closing(open_steered(model, list(steerings.values()), run)) as llm:
        divergence = Divergence(llm, held_out_passages())
        llm.angles.update(dict.fromkeys(llm.angles))
        off = {preset: probe_gaps(llm, held_out_probes(preset, PROBES)) for preset in pair}
        for name, on in missing.items():
            llm.angles.update(dict.fromkeys(llm.angles) | {each.name: each.default_dial() for each in on})
            cell: Cell = {"kl": divergence.now(), "dials": {each.name: each.default_dial() for each in on}}
            for preset in pair:
                change = probe_gaps(llm, held_out_probes(preset, PROBES)) - off[preset]
                cell[preset] = [float(change.mean()), float(change.std(ddof=1) / math.sqrt(len(change)))]
            found["settings"][name] = cell
            file.write_text(json.dumps(found, indent=1))
            print(f"{model}, {'+'.join(pair)}, {name}: {cell}", file=sys.stderr, flush=True)


# --- the page ---------------------------------------------------------------------------------------------------------

TITLES = {
    "first": "{0}",
    "second": "{1}",
    "both": "{0} and {1}, side by side",
    "sum": "`{0} + {1}`",
    "without": "`{0} ~ {1}`",
}


def section(cells: list[tuple[str, Cell]]) -> str:
    """The tables, one a model and pair."""
    lines = [
        "## Two at once, measured",
        "",
        "Change of the probe gap from off, nats per token with its standard error over 12 probes that calibration did "
        "not see, and KL from unsteered on neutral text. Every dial stands at its default. *Interaction* is what both "
        "do beyond the sum of what each does alone.",
        "",
    ]
    for model, cell in cells:
        one, other = cell["pair"]
        lines += [
            f"### {one} and {other}, {model}",
            "",
            f"| steered by | {one} probes | {other} probes | KL |",
            "|---|---|---|---|",
        ]
        for name, found in cell["settings"].items():
            changes = " | ".join(f"{found[preset][0]:+.2f} ± {found[preset][1]:.2f}" for preset in cell["pair"])
            lines.append(f"| {TITLES[name].format(one, other)} | {changes} | {found['kl']:.3f} |")
        settings = cell["settings"]
        beyond = [
            settings["both"][each][0] - settings["first"][each][0] - settings["second"][each][0]
            for each in cell["pair"]
        ]
        lines += [f"| *interaction* | {beyond[0]:+.2f} | {beyond[1]:+.2f} | |", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
