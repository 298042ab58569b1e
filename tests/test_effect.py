"""What a calibrated steering does to a real model, straight after `calibrate`: its probes move both ways."""

from __future__ import annotations

import math
from pathlib import Path

from edge_steer.calibration.dial import TARGET_KL
from edge_steer.calibration.engines import NativeEngine
from edge_steer.calibration.pipeline import CalibrationOptions, calibrate_model
from edge_steer.measure.divergence import Divergence
from edge_steer.measure.metrics import probe_gaps
from edge_steer.preset import load_preset
from edge_steer.runtime.llama import SteeredLlama


def test_a_steering_works_right_after_calibration(smollm2: Path) -> None:
    one_thread = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
    prompts, notes = load_preset("sentiment"), list[str]()
    engine = NativeEngine(str(smollm2), one_thread)
    steering = calibrate_model(
        engine, prompts.first(32), CalibrationOptions(orthogonal_to=None), name="mood", note=notes.append
    )
    assert steering.made.candidates[0] == "layer_out local"  # as measured best on this model
    assert steering.made.orthogonal_to == ()  # it is not near refusing
    assert len(steering.made.candidates) == 4
    assert sum(map(math.isnan, steering.made.candidate_min)) == 2  # half of them were measured upward only
    assert any("provisional range" in line for line in notes)
    assert steering.provisional
    assert steering.at_strength(1.0) == steering.angle == steering.angle_max
    llm = SteeredLlama(smollm2, steering=steering, angle=None, **one_thread)
    divergence = Divergence(llm)
    for dial in (steering.angle_min, steering.angle_max):
        assert 0.75 * TARGET_KL < divergence.at("mood", dial) < 1.25 * TARGET_KL
    gap: dict[float | None, float] = {}
    for dial in (steering.angle_min, None, steering.angle_max):
        llm.angle = dial
        gap[dial] = float(probe_gaps(llm, prompts.probes).mean())
    assert gap[steering.angle_max] - gap[None] >= 0.4
    assert gap[steering.angle_min] - gap[None] <= -0.4
