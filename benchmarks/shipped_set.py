"""The measured steerings that ship: of what benchmarks/effects.py calibrated a pack for each model, in models/.

    python benchmarks/shipped_set.py                       # all that there is
    python benchmarks/shipped_set.py --work OTHER/effects

The default steering of each model and preset is taken as `calibrate` made it, under the preset's name, with what it did
at the budget. Class means, which readings are told in, are recorded where a calibration is older than they are, and
kept with it. Run it again as more is measured; a model without any is left alone.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np
from effects import BUDGET, MODELS, OURS
from page import write_part

from edge_steer.calibration.classes import class_sums
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.calibration.site_choice import RECORDED_SITES
from edge_steer.fetch import resolve
from edge_steer.preset import load_preset, preset_names
from edge_steer.registry import entry
from edge_steer.sharing.pack import write_pack
from edge_steer.sharing.shipped import shipped_packs
from edge_steer.steering import Steering, save_all

PAGE = Path(__file__).parent.parent / "docs" / "packs.md"
PLACE = Path(__file__).parent.parent / "models" / "steerings"
# https://ai.google.dev/gemma/terms, 3.1: what is made of Gemma's weights is passed on with this notice.
LICENCES = {
    "Gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
    "these steerings are made of its activations, and the same terms hold"
}


@click.command()
@click.option("--models", default=MODELS, show_default=True)
@click.option("--work", default="benchmarks/measured/effects", show_default=True, help="Where measurements are kept.")
def main(models: str, work: str) -> None:
    """Write the packs."""
    PLACE.mkdir(exist_ok=True)
    for model in models.split(","):
        found, results = [], {}
        for preset in preset_names():
            folder = Path(work) / model / preset
            steering = default_steering(folder, model, preset)
            if steering is not None:
                found.append(steering)
                results |= {preset: at_budget(folder)} if at_budget(folder) else {}
        if found:
            licence = entry(model).licence
            write_pack(found, PLACE / model, licence=LICENCES.get(licence, licence), results=results, force=True)
    write_part(PAGE, "shipped_set.py", table())


def table() -> str:
    """What ships, by model, and how large it is."""
    lines, total = ["| model | measured | size |", "|---|---|---:|"], 0
    for model, card in shipped_packs().items():
        names = ", ".join(f"`{each.name}`" for each in card.entries)
        size = sum(file.stat().st_size for file in (PLACE / model).iterdir())
        lines.append(f"| {model} | {names} | {size / 1e3:.0f} kB |")
        total += size
    click.echo("\n".join(lines))
    return "\n".join([*lines, f"| all | | {total / 1e6:.1f} MB |"])


def default_steering(folder: Path, model: str, preset: str) -> Steering | None:
    file = folder / "steerings.gguf"
    if not file.exists():
        return None
    steerings = Steering.load_all(file)
    ours = next(each for each in steerings if each.name == OURS)
    if np.isnan(ours.class_means).all():
        ours = with_class_means(ours, model, preset)
        save_all([ours, *(each for each in steerings if each.name != OURS)], file, force=True)
    return ours.with_(name=preset)


def with_class_means(steering: Steering, model: str, preset: str) -> Steering:
    """The steering with the class means along its planes, recorded from the prompts that it was made of."""
    click.echo(f"{model}, {preset}: recording the class means", err=True)
    prompts = load_preset(preset)
    with closing(NativeRecorder(resolve(model, fetch=True), sites=RECORDED_SITES)) as recorder:
        numbers = np.array([recorder.sites.index(site) for site in steering.sites])
        sums = [class_sums(recorder, each, lambda _: None).at(numbers) for each in (prompts.negative, prompts.positive)]
    b1 = steering.basis[steering.site_plane][:, 0]
    along = [(each.mean * b1).sum(-1) for each in sums]
    return steering.with_(class_means=np.stack(along, axis=-1).astype(np.float32))


def at_budget(folder: Path) -> dict[str, Any]:
    """What the steering does at both ends of the budget, from effects.json."""
    file = folder / "effects.json"
    ours = json.loads(file.read_text()).get(OURS) if file.exists() else None
    if not ours:
        return {}
    return {
        "probe_gap_nats_per_token": {
            side: {key: round(ours[side][key], 4) for key in ("dial", "kl", "effect", "error")}
            for side in ("negative", "positive")
        },
        "budget_kl": BUDGET,
    }


if __name__ == "__main__":
    main()
