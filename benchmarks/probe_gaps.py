"""Effect and cost of every preset: the change of the probe gap and of the log-probability of neutral text, by angle.

    python benchmarks/probe_gaps.py                              # both small models, all presets, three kinds of plane
    python benchmarks/probe_gaps.py --models smollm2-135m --presets sentiment

The probe gap is the mean over a preset's probes of the log-probability per token of the positive minus the negative
continuation; neutral is the mean log-probability per token of plain prose. Both are told as the change from off.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
import numpy as np

from edge_steer.calibration import calibrate
from edge_steer.calibration.cached_recorder import CachedRecorder
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.errors import SteerError
from edge_steer.fetch import resolve
from edge_steer.measure.metrics import log_probabilities, plain_tokens, probe_gaps
from edge_steer.preset import load_preset, neutral_passages, preset_names
from edge_steer.prompts import Probe
from edge_steer.runtime.llama import SteeredLlama

VARIANTS = (("local", "site"), ("local", "all"), ("global", "layer"))


@click.command()
@click.option("--models", default="smollm2-135m,gemma3-270m", show_default=True)
@click.option("--presets", default=",".join(preset_names()), show_default=True)
@click.option("--angles", default="-16,-12,-8,-4,4,8,12,16", show_default=True)
@click.option("--passages", default=12, show_default=True, help="How many neutral passages, spread over the file.")
@click.option("--threads", default=2, show_default=True)
def main(models: str, presets: str, angles: str, passages: int, threads: int) -> None:
    """Print a Markdown table per model."""
    dials = [float(angle) for angle in angles.split(",")]
    run = {"n_ctx": 512, "n_threads": threads, "n_threads_batch": threads}
    neutral = neutral_passages()
    neutral = neutral[:: max(1, len(neutral) // passages)][:passages]
    print(f"`{' '.join(['python', *sys.argv])}`")
    for model in models.split(","):
        path = resolve(model, fetch=True)
        recorder = NativeRecorder(path, **run)
        print(f"\n### {model}: change of probe gap / of neutral text, nats per token\n")
        print("| preset | planes, mask | sites | " + " | ".join(f"{dial:+g}°" for dial in dials) + " |")
        print("|---|---|---|" + "---|" * len(dials))
        for name in presets.split(","):
            prompts = load_preset(name)
            remembered = CachedRecorder(recorder)
            for plane, mask in VARIANTS:
                try:
                    steering = calibrate(remembered, prompts, plane=plane, mask=mask)
                except SteerError:  # the mask is empty: this preset has no such steering on this model
                    print(f"| {name} | {plane}, {mask} | 0 | " + " | ".join("–" for _ in dials) + " |", flush=True)
                    continue
                llm = SteeredLlama(path, steering=steering, angle=None, **run)
                gap, cost = measure_at(llm, prompts.probes, neutral, None)
                cells = []
                for dial in dials:
                    turned_gap, turned_cost = measure_at(llm, prompts.probes, neutral, dial)
                    cells.append(f"{turned_gap - gap:+.2f} / {turned_cost - cost:+.2f}")
                print(f"| {name} | {plane}, {mask} | {len(steering.steered)} | " + " | ".join(cells) + " |", flush=True)
                llm.close()


def measure_at(
    llm: SteeredLlama, probes: Sequence[Probe], neutral: Sequence[str], dial: float | None
) -> tuple[float, float]:
    """Mean probe gap and mean log-probability of neutral text at a dial."""
    llm.angle = dial
    cost = np.mean([log_probabilities(llm, plain_tokens(llm, text), 1).mean() for text in neutral])
    return float(probe_gaps(llm, probes).mean()), float(cost)


if __name__ == "__main__":
    main()
