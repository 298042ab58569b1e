"""The dial that calibration measures: at a known divergence, whatever the model's scale, and on both engines alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from planted import random_steering

from edge_steer.calibration.dial import TARGET_KL, TOLERANCE, DialPosition, find_dial, with_provisional_range
from edge_steer.calibration.engines import NativeEngine, TorchEngine
from edge_steer.calibration.pipeline import CalibrationOptions, calibrate_model
from edge_steer.calibration.site_choice import (
    ATTENTION,
    CANDIDATES,
    CalibrationSplit,
    Candidate,
    choose_best,
    format_table,
)
from edge_steer.choices import Operator
from edge_steer.errors import NoEffectError
from edge_steer.prompts import Prompt, PromptSet
from edge_steer.provenance import BaseModel
from edge_steer.sites import Site

BASE = BaseModel("llama", "m", 4, 32)
PROMPTS = PromptSet(
    "mood", "", "love", "hate",
    *(tuple(Prompt(f"I {word} {thing}") for thing in ("tea", "the sun", "rain", "old books", "maps", "a walk", "trains",
      "winter", "my town", "soup", "Mondays", "paint")) for word in ("love", "hate")),
)  # fmt: skip


class Growing:
    """A divergence that grows as a power of the angle: TARGET_KL at `scale`, at most `limit`."""

    def __init__(self, scale: float, power: float = 1.5, limit: float = math.inf) -> None:
        self.scale, self.power, self.limit = scale, power, limit
        self.asked: list[float] = []

    def at(self, name: str, angle: float) -> float:
        self.asked.append(angle)
        return min(TARGET_KL * (abs(angle) / self.scale) ** self.power, self.limit)


def steering(kind: str = "layer_out", operator: Operator = "selective") -> Any:
    return random_steering(BASE, [Site(layer, kind) for layer in (2, 3)], operator)


@pytest.mark.parametrize("kind", ["layer_out", "attn_norm"])
@pytest.mark.parametrize("power", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("scale", [0.05, 0.4, 3.0, 12.0, 80.0])
def test_the_dial_is_found_over_three_orders_of_magnitude(scale: float, power: float, kind: str) -> None:
    for sign in (-1, 1):
        divergence: Any = Growing(scale, power)
        found = find_dial(divergence, steering(kind), sign)
        assert math.copysign(1, found.angle) == sign
        assert TARGET_KL / (1 + TOLERANCE) <= found.kl <= TARGET_KL * (1 + TOLERANCE)
        assert len(divergence.asked) <= 8


def test_another_target_and_the_scale_of_additions() -> None:
    found = find_dial(Growing(3.0), steering(), 1, target=0.25)  # type: ignore[arg-type]
    assert 0.25 / (1 + TOLERANCE) <= found.kl <= 0.25 * (1 + TOLERANCE)
    divergence: Any = Growing(0.03)
    found = find_dial(divergence, steering(operator="addition"), 1)
    assert divergence.asked[0] == pytest.approx(3 * math.tan(math.radians(1)))
    assert TARGET_KL / (1 + TOLERANCE) <= found.kl <= TARGET_KL * (1 + TOLERANCE)


def test_a_turn_that_never_costs_so_much_ends_at_a_right_angle() -> None:
    assert abs(find_dial(Growing(500.0), steering("attn_norm"), -1).angle) == 90  # type: ignore[arg-type]
    with pytest.raises(NoEffectError, match="changes nothing up to 90"):
        find_dial(Growing(1.0, limit=0.0), steering("attn_norm"), 1)  # type: ignore[arg-type]


def test_the_range_is_stored_as_provisional_and_its_upper_end_as_default() -> None:
    made = with_provisional_range(steering(), DialPosition(-1.23456, 0.08), DialPosition(2.34567, 0.08))
    assert (made.angle, made.angle_min, made.angle_max) == pytest.approx((2.35, -1.23, 2.35), rel=1e-6)
    assert made.provisional
    assert made.default_dial() == made.at_strength(1.0)


def test_own_prompts_are_held_out_to_measure_on() -> None:
    split = CalibrationSplit.of(PROMPTS)
    assert split.held_out is not None
    assert (len(split.prompts.positive), len(split.held_out.positive)) == (10, 2)
    assert not set(split.prompts.positive) & set(split.held_out.positive)
    few = CalibrationSplit.of(PROMPTS.first(4))
    assert few.prompts.positive == few.held_out.positive  # type: ignore[union-attr]


def test_both_engines_choose_alike(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import tiny

    model = tiny.build("llama", tmp_path)
    run = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
    native = calibrate_model(NativeEngine(str(model.gguf_path), run), PROMPTS)
    torch = calibrate_model(TorchEngine(str(model.hf_dir), {"device": "cpu"}), PROMPTS)
    assert native.made.candidates == torch.made.candidates
    assert set(native.made.candidates) | {ATTENTION.name} == {each.name for each in CANDIDATES}
    assert native.made.candidate_max == pytest.approx(torch.made.candidate_max, rel=0.05)
    assert native.made.candidate_positive == pytest.approx(torch.made.candidate_positive, rel=0.2, abs=1e-3)
    assert native.angle_max == pytest.approx(torch.angle_max, rel=0.05)


@pytest.mark.parametrize(("norms", "is_measured"), [(0.74, False), (0.76, True), (2.0, True)])
def test_attention_is_not_measured_where_norms_fall_behind(
    monkeypatch: pytest.MonkeyPatch, norms: float, is_measured: bool
) -> None:
    """Its sites are among theirs; what is measured looks for its dial where the one before it was found."""
    effects = {"layer_out shared": 1.0, "layer_out local": 0.9, "norms local": norms, "attention local": 9.0}
    model: Any = type("Dialled", (), {"angles": dict.fromkeys(effects)})()
    scales = {"layer_out shared": 2.0, "layer_out local": 2.1, "norms local": 40.0, "attention local": 45.0}
    asked: list[tuple[str, float]] = []

    class Scaled:
        def __init__(self, model: Any) -> None: ...

        def at(self, name: str, angle: float) -> float:
            asked.append((name, angle))
            return TARGET_KL * (abs(angle) / scales[name]) ** 2

    def gap(model: Any, prompts: Any) -> Any:
        return lambda: sum(math.copysign(effects[name], dial) for name, dial in model.angles.items() if dial)

    monkeypatch.setattr("edge_steer.calibration.site_choice.Divergence", Scaled)
    monkeypatch.setattr("edge_steer.calibration.site_choice._probe_gap", gap)
    steerings = {each: steering().with_(name=each.name) for each in CANDIDATES}
    steps: list[int] = []
    found = choose_best(model, steerings, CalibrationSplit(PROMPTS, None), step=steps.append)[1]
    assert [each.candidate for each in found if each.candidate == ATTENTION] == [ATTENTION] * is_measured
    assert sum(steps) == 6
    first = {name: angle for name, angle in reversed(asked) if angle > 0}
    assert first["layer_out local"] == found_dial(found, Candidate("layer_out", "shared"))
    if is_measured:
        assert first["attention local"] == found_dial(found, Candidate("norms", "local"))
        assert found[0].candidate == ATTENTION


def found_dial(found: Any, candidate: Candidate) -> float:
    return next(float(each.high.angle) for each in found if each.candidate == candidate)


@pytest.mark.parametrize("is_near", [True, False])
def test_refusals_and_apologies_are_projected_out_where_a_model_is_near_refusing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_near: bool
) -> None:
    pytest.importorskip("torch")
    import tiny

    monkeypatch.setattr("edge_steer.calibration.pipeline.is_near_refusing", lambda model: is_near)
    engine = NativeEngine(str(tiny.build("llama", tmp_path).gguf_path), {"n_ctx": 512, "n_threads": 1})
    notes: list[str] = []
    options = CalibrationOptions(orthogonal_to=None, sites="layer_out", dial=False)
    found = calibrate_model(engine, PROMPTS, options, note=notes.append)
    assert found.made.orthogonal_to == (("refusal", "apology") if is_near else ())
    assert any("refusals and apologies are projected out" in each for each in notes) == is_near


def test_what_is_given_is_not_measured(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import tiny

    model = tiny.build("qwen2", tmp_path)
    run = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}

    def made(**options: Any) -> Any:
        return calibrate_model(NativeEngine(str(model.gguf_path), run), PROMPTS, CalibrationOptions(**options))

    shared = made(plane="shared", layers=(1, 2))
    assert (shared.plane, {site.kind for site in shared.sites}, shared.made.candidates) == ("shared", {"layer_out"}, ())
    assert shared.provisional
    assert {site.kind for site in made(sites="norms", dial=False).sites} == {"attn_norm", "ffn_norm", "output_norm"}
    assert math.isnan(made(dial=False).angle)
    assert math.isnan(made(operator="standard").angle)
    assert made(operator="addition").made.candidates
    assert format_table([]) != []
