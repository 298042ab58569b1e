"""Two steerings at once: what each does alone, both side by side, and their sum as one steering, 2 × 2.

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

from edge_steer import SteeredLlama, SteerError, combine
from edge_steer.measure.divergence import Divergence
from edge_steer.measure.metrics import probe_gaps
from edge_steer.sharing.find import find_steerings

PAGE = Path(__file__).parent.parent / "docs" / "composing.md"
MODELS = "smollm2-135m,qwen2.5-coder-0.5b"
PAIRS = "sentiment+warmth,sentiment+formality"
PROBES = 12
SUM = "sum"
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
            if not page and not file.exists():
                found = measure(model, pair.split("+"), threads)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(found, indent=1))
            if file.exists():
                cells.append((model, json.loads(file.read_text())))
    write_part(PAGE, "interaction.py", section(cells))


def measure(model: str, pair: list[str], threads: int) -> Cell:
    """The change of both presets' probe gaps and the divergence on neutral text, under each of the settings."""
    one, other = (find_steerings(name, model)[0] for name in pair)
    steerings = [one, other]
    try:
        steerings.append(combine(" + ".join(pair), [one, other], name=SUM))
    except SteerError as error:
        print(f"{model}, {'+'.join(pair)}: no sum: {error}", file=sys.stderr, flush=True)
    settings = {"first": [one.name], "second": [other.name], "both": [one.name, other.name]}
    settings |= {SUM: [SUM]} if len(steerings) == 3 else {}
    run = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads}
    found: Cell = {"pair": pair, "dials": {each.name: each.default_dial() for each in steerings}, "settings": {}}
    with closing(open_steered(model, steerings, run)) as llm:
        divergence = Divergence(llm, held_out_passages())
        set_dials(llm, [])
        off = {preset: probe_gaps(llm, held_out_probes(preset, PROBES)) for preset in pair}
        for name, on in settings.items():
            set_dials(llm, on)
            cell: Cell = {"kl": divergence.now()}
            for preset in pair:
                change = probe_gaps(llm, held_out_probes(preset, PROBES)) - off[preset]
                cell[preset] = [float(change.mean()), float(change.std(ddof=1) / math.sqrt(len(change)))]
            found["settings"][name] = cell
            print(f"{model}, {'+'.join(pair)}, {name}: {cell}", file=sys.stderr, flush=True)
    return found


def set_dials(llm: SteeredLlama, on: list[str]) -> None:
    """These steerings at their defaults, all others off."""
    llm.angles.update(dict.fromkeys(llm.angles))
    for each in llm.steerings:
        if each.name in on:
            llm.angles[each.name] = each.default_dial()


# --- the page ---------------------------------------------------------------------------------------------------------

TITLES = {"first": "{0}", "second": "{1}", "both": "{0} and {1}, side by side", SUM: "{0} + {1} as one steering"}


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
