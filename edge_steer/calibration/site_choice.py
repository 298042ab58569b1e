"""Which sites and planes: measured on the very model, since none is best on all.

Candidates are compared at one divergence (dial.py): the one that changes a gap most there is taken. Letters: V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.architectures import architecture
from edge_steer.calibration.dial import DialPosition, find_dial, with_provisional_range
from edge_steer.calibration.steering import calibrate
from edge_steer.calibration.sums import Recorder, Step
from edge_steer.choices import Mask, Operator
from edge_steer.errors import SteerError
from edge_steer.measure.divergence import Divergence
from edge_steer.measure.evaluation_set import pick_evenly
from edge_steer.measure.measured_model import MeasuredModel, set_dial
from edge_steer.measure.metrics import log_softmax, probe_gaps
from edge_steer.prompts import Prompt, PromptSet
from edge_steer.sites import Architecture
from edge_steer.steering import Steering

PROBES = 8
HELD_OUT = 8  # prompts a class, where there are no probes
# Candidates that are measured in both directions; the others fell behind in the first.
FINALISTS = 2
# Attention's sites are among those of norms, and moved a gap at most 1.25 times as far (docs/results.md, "Was the quick
# choice right"): where norms come to less than this share of the best, they are not measured.
_NEAR_BEST = 0.75
# What is recorded so that every candidate can be made from it.
RECORDED_SITES = "norms,layer_out"


@dataclass(frozen=True)
class Candidate:
    """A choice of sites and planes: what `calibrate` is asked for. `sites` as for Architecture.kinds_for."""

    sites: str
    plane: str

    @property
    def name(self) -> str:
        return f"{self.sites} {self.plane}"


NORMS, ATTENTION = Candidate("norms", "local"), Candidate("attention", "local")
CANDIDATES = (Candidate("layer_out", "shared"), Candidate("layer_out", "local"), NORMS, ATTENTION)


@dataclass(frozen=True)
class CandidateMeasurement:
    """A candidate's steering with its dials at one divergence, and how far each end moves the gap (None: not asked)."""

    candidate: Candidate
    steering: Steering
    high: DialPosition
    positive: float
    low: DialPosition | None = None
    negative: float | None = None

    @property
    def effect(self) -> float:
        """The change of the gap from one end to the other; of one that was measured upward only, twice that."""
        return self.positive * 2 if self.negative is None else self.positive - self.negative


def site_kinds(candidate: Candidate, known: Architecture) -> tuple[str, ...]:
    """The kinds of site that a candidate means in an architecture."""
    if candidate.sites != "attention":
        return known.kinds_for(candidate.sites)
    return (known.attention_norm,) if known.attention_norm else known.kinds_for("pre")


def measurement_count(count: int = len(CANDIDATES)) -> int:
    """How many `step` calls `choose_best` makes for so many candidates."""
    return count + min(FINALISTS, count)


@dataclass(frozen=True)
class CalibrationSplit:
    """The prompts to calibrate on, and those held out to measure on where there are no probes."""

    prompts: PromptSet
    held_out: PromptSet | None

    @classmethod
    def of(cls, prompts: PromptSet) -> CalibrationSplit:
        """Every fifth prompt of a class is held out, HELD_OUT at most; where there are few, the same serve both."""
        if prompts.probes:
            return cls(prompts, None)
        if min(len(prompts.positive), len(prompts.negative)) < 10:
            return cls(prompts, prompts.first(HELD_OUT))

        def split_side(side: tuple[Prompt, ...]) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
            out = side[4::5][:HELD_OUT]
            return tuple(each for number, each in enumerate(side) if number % 5 != 4 or number // 5 >= HELD_OUT), out

        positive, held_positive = split_side(prompts.positive)
        negative, held_negative = split_side(prompts.negative)
        return cls(
            replace(prompts, positive=positive, negative=negative),
            replace(prompts, positive=held_positive, negative=held_negative),
        )


def calibrate_candidates(
    recorder: Recorder,
    prompts: PromptSet,
    *,
    operator: Operator = "selective",
    mask: Mask | None = None,
    orthogonal_to: Sequence[PromptSet | Steering] = (),
    step: Step,
    note: Callable[[str], object],
) -> dict[Candidate, Steering]:
    """A steering for each candidate that the prompts allow; `note` is told of the others.

    recorder: of RECORDED_SITES; hand in a CachedRecorder, and the prompts are run once. step: as for calibrate.
    Raises SteerError if the prompts allow none.
    """
    steerings: dict[Candidate, Steering] = {}
    known = architecture(recorder.base.architecture)
    reasons = []
    for candidate in CANDIDATES:
        how: dict[str, Any] = {"plane": candidate.plane, "kinds": site_kinds(candidate, known)}
        try:
            steerings[candidate] = calibrate(
                recorder, prompts, operator=operator, mask=mask, orthogonal_to=orthogonal_to, name=candidate.name,
                step=step, **how,
            )  # fmt: skip
        except SteerError as error:
            reasons.append(f"{candidate.name} is left out: {error}")
            note(reasons[-1])
    if not steerings:
        raise SteerError(f"expected a choice of sites that these prompts allow, got none: {reasons[0]}")
    return steerings


def choose_best(
    model: MeasuredModel, steerings: dict[Candidate, Steering], split: CalibrationSplit, *, step: Step
) -> tuple[Steering, list[CandidateMeasurement]]:
    """The steering that moves the gap most at one divergence, with its provisional range; and all that was measured,
    the best first.

    model: with all of `steerings`. step: called with 1 after each of `measurement_count()` measurements.
    """
    held_out = split.held_out
    gap = _probe_gap(model, split.prompts) if held_out is None else _next_token_gap(model, held_out)
    found = _measure_candidates(model, steerings, gap, step)
    best = found[0]
    assert best.low is not None
    steering = with_provisional_range(best.steering, best.low, best.high)
    made = replace(
        steering.made,
        candidates=tuple(each.candidate.name for each in found),
        candidate_min=tuple(math.nan if each.low is None else each.low.angle for each in found),
        candidate_max=tuple(each.high.angle for each in found),
        candidate_negative=tuple(math.nan if each.negative is None else each.negative for each in found),
        candidate_positive=tuple(each.positive for each in found),
    )
    return steering.with_(made=made), found


def _measure_candidates(
    model: MeasuredModel, steerings: dict[Candidate, Steering], gap: Callable[[], float], step: Step
) -> list[CandidateMeasurement]:
    """Every candidate upward that may be the best; those that moved most also downward. The best first.

    Where a dial is looked for first, is where that of the candidate before it at sites of that sort was found.
    """
    divergence = Divergence(model)
    set_dial(model, None, None)
    off = gap()

    def change(steering: Steering, dial: DialPosition) -> float:
        set_dial(model, steering.name, dial.angle)
        return gap() - off

    upward: list[CandidateMeasurement] = []
    nearby: dict[bool, float] = {}
    for candidate, steering in steerings.items():
        if candidate != ATTENTION or _may_be_best(upward):
            in_stream = candidate.sites == "layer_out"
            high = find_dial(divergence, steering, 1, first=nearby.get(in_stream))
            nearby[in_stream] = high.angle
            upward.append(CandidateMeasurement(candidate, steering, high, change(steering, high)))
        step(1)
    upward.sort(key=lambda each: -each.effect)
    both = []
    for each in upward[:FINALISTS]:
        low = find_dial(divergence, each.steering, -1, first=each.high.angle)
        both.append(replace(each, low=low, negative=change(each.steering, low)))
        step(1)
    set_dial(model, None, None)
    return [*sorted(both, key=lambda each: -each.effect), *upward[FINALISTS:]]


def _may_be_best(found: Sequence[CandidateMeasurement]) -> bool:
    """Whether attention's sites can still move a gap the furthest, after what the others did."""
    norms = next((each.effect for each in found if each.candidate == NORMS), None)
    return norms is None or norms >= _NEAR_BEST * max(each.effect for each in found)


def _probe_gap(model: MeasuredModel, prompts: PromptSet) -> Callable[[], float]:
    probes = pick_evenly(prompts.probes, PROBES)
    return lambda: float(probe_gaps(model, probes).mean())


def _next_token_gap(model: MeasuredModel, held_out: PromptSet) -> Callable[[], float]:
    """How much likelier the model finds, after all held-out prompts, what it unsteered says next to positive ones than
    what it says to negative ones: Σ (p₊ − p₋) log p over the vocabulary, mean over the prompts."""
    prompts = (held_out.positive, held_out.negative)
    tokens = [[model.text_tokens(model.chat_template.prompt_text(each)) for each in side] for side in prompts]

    def expected(asked: Sequence[list[int]]) -> NDArray[np.float64]:
        texts = [([*each, each[0]], len(each)) for each in asked]
        return np.stack(model.map_logits(texts, lambda _, rows: log_softmax(rows)[0])).astype(float)

    set_dial(model, None, None)
    positive, negative = (np.exp(expected(side)).mean(0) for side in tokens)
    return lambda: float((expected([*tokens[0], *tokens[1]]) @ (positive - negative)).mean())


def format_table(found: Sequence[CandidateMeasurement]) -> list[str]:
    """What was measured, a line a candidate, the best first."""
    lines = [f"  {'sites':<17} {'dial':>18}   change of the gap"]
    for each in found:
        low = "" if each.low is None else f"{each.low.angle:+.3g}"
        ends = f"{each.positive:+.2f}" if each.negative is None else f"{each.negative:+.2f} / {each.positive:+.2f}"
        lines.append(f"  {each.candidate.name:<17} {f'{low} … {each.high.angle:+.3g}':>18}   {ends}")
    return lines
