"""Sweeps on a tiny random model: resumed, judged by halves, written into a file."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from command import steering_for

from edge_steer import SteerError
from edge_steer.measure.capability import Question, score_options
from edge_steer.measure.evaluation_set import (
    EvaluationSet,
    EvaluationSizes,
    build_evaluation_set,
    find_preset,
    pick_evenly,
)
from edge_steer.measure.metrics import log_softmax, pick_log_probabilities, plain_tokens
from edge_steer.prompts import Probe, Prompt, PromptSet
from edge_steer.provenance import Made
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering
from edge_steer.sweep.budget import Budget, SafeRange
from edge_steer.sweep.curve import Curve, with_safe_range
from edge_steer.sweep.journal import Journal, JournalKey
from edge_steer.sweep.measurements import ModelUnderTest
from edge_steer.sweep.point_metrics import PointMetrics
from edge_steer.sweep.search import QUICK_SIZE, SweepSize
from edge_steer.sweep.sweep import Sweep, journal_settings
from edge_steer.sweep.tables import write_csv, write_json

RUN: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
# A random model is no good at anything: it has a range at all with limits of its own.
LENIENT = Budget(kl=0.5, retention=0.0, repetition_slack=1.0)
SMALL = EvaluationSet(
    probes=(Probe("How?", "well", "ill"), Probe("Who?", "the king", "a thief")),
    passages=("The river runs to the sea.", "Bread is made of flour."),
    questions=(
        Question("fact", "The sun is", "hot", ("cold", "wet")),
        Question("fact", "The sea is", "wet", ("dry", "a tree")),
        Question("fact", "The sky is", "blue", ("a bird", "red")),
    ),
    openings=("Say it.", "Tell me."),
    answer_tokens=6,
    positive=(Prompt("I am glad"), Prompt("I am well")),
    negative=(Prompt("I am sad"), Prompt("I am ill")),
)


def start_sweep(model: Path, folder: Path, *steerings: Steering, report: Any = None, **changes: Any) -> Sweep:
    folder.mkdir(exist_ok=True)
    llm = SteeredLlama(model, steering=steerings, angles=dict.fromkeys(each.name for each in steerings), **RUN)
    journal = Journal.open(folder / "points.jsonl", journal_settings(model, SMALL, steerings, "all"))
    return Sweep(
        ModelUnderTest(llm, SMALL), journal, **{"budget": LENIENT, **({"report": report} if report else {}), **changes}
    )


class Stop(Exception):
    """Ctrl-C, at a place of our choosing."""


def test_a_sweep_that_was_stopped_goes_on_to_the_same_result(model: Path, tmp_path: Path) -> None:
    steering = steering_for(model)
    seen: list[PointMetrics] = []

    def stop_after_5(_: str, found: PointMetrics) -> None:
        seen.append(found)
        if len(seen) == 5:
            raise Stop

    whole = start_sweep(model, tmp_path / "whole", steering).measure_curve(steering, QUICK_SIZE)
    with pytest.raises(Stop):
        start_sweep(model, tmp_path / "stopped", steering, report=stop_after_5).measure_curve(steering, QUICK_SIZE)
    path = tmp_path / "stopped" / "points.jsonl"
    kept = path.read_text()
    path.write_text(kept + '{"curve": "half a li')
    resumed = start_sweep(model, tmp_path / "stopped", steering).measure_curve(steering, QUICK_SIZE)
    assert path.read_text().startswith(kept)
    assert resumed.points == whole.points
    assert resumed.safe_range == whole.safe_range
    assert len(whole.points) >= 4


def test_nothing_is_measured_twice(model: Path, tmp_path: Path) -> None:
    steering = steering_for(model)
    first = start_sweep(model, tmp_path, steering)
    curve = first.measure_curve(steering, QUICK_SIZE)
    again = start_sweep(model, tmp_path, steering)
    again.model.llm.close()  # it is not needed
    assert again.measure_curve(steering, QUICK_SIZE) == curve


def test_another_model_material_or_steering_is_another_sweep(model: Path, tmp_path: Path) -> None:
    one, other = steering_for(model), steering_for(model, seed=1)
    path = tmp_path / "points.jsonl"
    Journal.open(path, journal_settings(model, SMALL, [one], "all")).put(
        JournalKey(None, None, "probes"), {"gaps": [1.0]}
    )
    assert len(Journal.open(path, journal_settings(model, SMALL, [one.with_(angle=8.0, description="x")], "all"))) == 1
    for steering, texts, word in (
        (other, SMALL, "steerings"),
        (one, build_evaluation_set(EvaluationSizes()), "material"),
    ):
        with pytest.raises(SteerError, match=f"another {word}; .*--force"):
            Journal.open(path, journal_settings(model, texts, [steering], "all"))
    assert len(Journal.open(path, journal_settings(model, SMALL, [other], "all"), force=True)) == 0


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text("[]\nhello\n")
    with pytest.raises(SteerError, match="expected a sweep's journal"):
        Journal.open(path, {})
    assert path.read_text() == "[]\nhello\n"


def test_the_range_is_judged_by_each_half_of_what_was_measured(model: Path, tmp_path: Path) -> None:
    steering = steering_for(model)
    sweep = start_sweep(model, tmp_path, steering, half=0)
    sweep.measure_curve(steering, SweepSize(step=4.0, rounds=2, bends=1))
    count = len(sweep.journal)
    halves = [sweep.evaluate_curve(steering, half=half) for half in (0, 1)]
    assert len(sweep.journal) == count
    gaps = [{point.dial: point.gap for point in half.points} for half in halves]
    both = {point.dial: point.gap for point in start_sweep(model, tmp_path, steering).measured_points(steering)}
    for dial, gap in both.items():
        assert gap == pytest.approx((gaps[0][dial] + gaps[1][dial]) / 2)  # type: ignore[operator]
    assert gaps[0] != gaps[1]


def test_several_steerings_share_what_is_off(model: Path, tmp_path: Path) -> None:
    one, other = steering_for(model, name="one"), steering_for(model, name="other", seed=3)
    sweep = start_sweep(model, tmp_path, one, other)
    alone = start_sweep(model, tmp_path / "alone", other).measure_curve(other, QUICK_SIZE, [4.0, -4.0])
    sweep.measure_curve(one, QUICK_SIZE, [4.0])
    together = sweep.measure_curve(other, QUICK_SIZE, [4.0, -4.0])
    assert together.points == alone.points
    assert [point.dial for point in together.points] == [-4.0, 4.0]
    lines = [json.loads(line) for line in (tmp_path / "points.jsonl").read_text().splitlines()[1:]]
    assert sum(line["curve"] is None and line["part"] == "questions" for line in lines) == 1


def test_off_is_where_every_change_is_counted_from(model: Path, tmp_path: Path) -> None:
    steering = steering_for(model)
    off = start_sweep(model, tmp_path, steering).measure_at(steering, None, complete=True)
    assert (off.gap, off.kl, off.shift, off.self_read, off.retention) == (0, 0, 0, None, 1)
    turned = start_sweep(model, tmp_path, steering).measure_at(steering, 40.0, complete=True)
    assert turned.kl_p99 is not None
    assert turned.kl is not None
    assert turned.kl_p99 >= turned.kl > 0.01
    assert turned.shift != 0 != turned.self_read


def test_options_are_scored_as_when_each_is_read_from_the_start(model: Path) -> None:
    llm = SteeredLlama(model, steering=(), **RUN)
    for question, scores in zip(SMALL.questions, score_options(llm, SMALL.questions), strict=True):
        for option, score in zip(question.options, scores, strict=True):
            llm.reset()
            tokens = plain_tokens(llm, f"{question.prompt} {option}")
            start = len(plain_tokens(llm, question.prompt))
            by_hand = pick_log_probabilities(log_softmax(llm.logits(tokens, start)), tokens[start:]).mean()
            assert score == pytest.approx(float(by_hand), abs=1e-4)


def curve_of(steering: Steering, low: float, high: float) -> Curve:
    off = PointMetrics(None)
    return Curve(steering, off, (), 0.0, SafeRange(low, high, "kl", "kl"), off, off)


def test_a_written_range_brings_a_default_where_there_is_none(model: Path, tmp_path: Path) -> None:
    steering = steering_for(model)
    found = with_safe_range(curve_of(steering, -6.0, 9.0))
    assert (found.angle_min, found.angle_max, found.angle) == (-6, 9, 4.5)
    assert found.at_strength(-0.5) == -3
    assert with_safe_range(curve_of(steering, -6.0, 0.0)).angle == -3
    measured = steering.with_(angle=1.0, angle_min=-1.0, angle_max=1.0, provisional=True)
    replaced = with_safe_range(curve_of(measured, -6.0, 9.0))
    assert (replaced.angle, replaced.angle_min, replaced.angle_max, replaced.provisional) == (4.5, -6.0, 9.0, False)
    assert with_safe_range(curve_of(steering.with_(angle=2.0), -6.0, 9.0)).angle == 2
    assert math.isnan(steering.angle)
    with pytest.raises(SteerError, match="expected a safe range to store"):
        with_safe_range(curve_of(steering, 0.0, 0.0))


def test_tables_hold_every_position_and_say_which_are_safe(model: Path, tmp_path: Path) -> None:
    steering = steering_for(model)
    curve = start_sweep(model, tmp_path, steering).measure_curve(steering, QUICK_SIZE)
    write_csv([curve], tmp_path / "sweep.csv")
    write_json([curve], {"model": "tiny"}, tmp_path / "sweep.json")
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    record = json.loads((tmp_path / "sweep.json").read_text())["curves"][0]
    dials = [point.dial for point in curve.points]
    assert [float(row["dial"]) for row in rows if row["dial"]] == dials == [p["dial"] for p in record["points"]]
    assert curve.safe_range is not None
    safe = [curve.safe_range.low <= (dial or 0) <= curve.safe_range.high for dial in dials]
    assert [bool(int(row["safe"])) for row in rows][1:] == safe == [point["safe"] for point in record["points"]]
    assert len(record["sites"]) == len(steering.sites)
    assert record["safe_range"]["high"] == curve.safe_range.high


def test_a_preset_is_known_by_the_prompts_that_a_steering_was_calibrated_on(model: Path) -> None:
    from edge_steer.preset import load_preset

    preset = load_preset("warmth")
    for used in (preset, preset.first(7)):
        made = Made(prompts_sha256=used.sha256, positive_count=len(used.positive), negative_count=len(used.negative))
        found = find_preset(steering_for(model).with_(made=made))
        assert found is not None
        assert found.name == "warmth"
    assert find_preset(steering_for(model)) is None


def test_texts_are_spread_over_their_set() -> None:
    assert pick_evenly(range(10), 3) == (0, 3, 6)
    assert pick_evenly("ab", 5) == ("a", "b")
    prompts = PromptSet("own", "", "a", "b", (Prompt("x"), Prompt("y")), (Prompt("z"),))
    made = build_evaluation_set(EvaluationSizes(held_out=1), held_out=prompts)
    assert len(made.openings) == 32
    assert (len(made.passages), len(made.questions), made.positive) == (12, 160, (Prompt("x"),))
