"""What a calibrated steering does to a real model: its probes move both ways, and plain prose stays about as likely."""

from __future__ import annotations

from pathlib import Path

from edge_steer.calibrate import calibrate
from edge_steer.calibrate.native_recorder import NativeRecorder
from edge_steer.contrast import load_preset, neutral_passages
from edge_steer.evaluate.metrics import probe_gaps, text_log_probabilities
from edge_steer.runtime.llama import SteeredLlama

ANGLE = 8.0  # that of the demo


def test_sentiment_moves_the_probe_gap_both_ways_and_costs_little(smollm2: Path) -> None:
    one_thread = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
    prompts = load_preset("sentiment")
    steering = calibrate(NativeRecorder(smollm2, **one_thread), prompts)
    llm = SteeredLlama(smollm2, steering=steering, angle=None, **one_thread)
    gap, plain = {}, {}
    for dial in (-ANGLE, None, ANGLE):
        llm.angle = dial
        gap[dial] = float(probe_gaps(llm, prompts.probes).mean())
        plain[dial] = float(text_log_probabilities(llm, neutral_passages()[::8]).mean())
    assert gap[ANGLE] - gap[None] >= 0.4
    assert gap[-ANGLE] - gap[None] <= -0.4
    assert min(plain[ANGLE], plain[-ANGLE]) > plain[None] - 0.5
