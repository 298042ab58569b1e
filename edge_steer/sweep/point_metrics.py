"""From raw measurements to the metrics of one position of the dial: plain arithmetic, told as change from off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.measure import text_quality
from edge_steer.measure.capability import confidence, is_correct
from edge_steer.sweep.measurements import RawMeasurement

RawMeasurements = Mapping[str, RawMeasurement]  # by name
ItemHalf = int | None  # 0: the 1st, 3rd, 5th … of all items; 1: the 2nd, 4th …; None: all


@dataclass(frozen=True)
class PointMetrics:
    """One position of the dial; None where something was not measured. `dial` None is off.

    gap: change of the probe gap in nats per token, with its standard error over the probes. shift: how far held-out
    prompts moved along b1, 1 being the distance of the two classes. self_read: change of where the unsteered model
    stands along b1 as it reads the answers, in shares of ‖h‖.
    kl: mean divergence from unsteered on neutral text, nats per token, with its standard error over passages; kl_p99:
    its 99th percentile over tokens.
    perplexity: of neutral text. accuracy: share of questions answered right; retention: that over the unsteered one,
    with its standard error: √(answers that turned right or wrong), over the right ones unsteered. confidence: mean
    share of the answer among the options; confidence_kept: that over the unsteered one.
    answer_perplexity (of the answers, unsteered; geometric mean), repetition (with its standard error), language,
    compression: means over the answers. violations, strict_violations: shares of the answers.
    """

    dial: float | None
    gap: float | None = None
    gap_error: float | None = None
    shift: float | None = None
    self_read: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    kl_p99: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    retention: float | None = None
    retention_error: float | None = None
    confidence: float | None = None
    confidence_kept: float | None = None
    answer_perplexity: float | None = None
    repetition: float | None = None
    repetition_error: float | None = None
    language: float | None = None
    compression: float | None = None
    violations: float | None = None
    strict_violations: float | None = None

    @property
    def effect(self) -> float | None:
        """The probe gap's change where there are probes, else the self-read score's."""
        return self.gap if self.gap is not None else self.self_read

    @property
    def complete(self) -> bool:
        """Whether all that a budget asks for was measured."""
        return None not in (self.kl, self.retention, self.repetition)

    def record(self) -> dict[str, Any]:
        """For JSON and CSV."""
        return {"dial": self.dial, "effect": self.effect, **asdict(self)}


def compute_metrics(
    dial: float | None, on: RawMeasurements, off: RawMeasurements, half: ItemHalf = None
) -> PointMetrics:
    """The metrics of what was measured at `dial`, against what was measured off; of one half of the items if asked."""
    found: dict[str, float] = {}
    if "probes" in on:
        found |= _probe_gap(on["probes"], off["probes"], half)
    if "held_out" in on:
        found["shift"] = _shift(on["held_out"], off["held_out"], half)
    if "reading" in on:
        change = _array(on["reading"]["self_read"], half) - _array(off["reading"]["self_read"], half)
        found["self_read"] = float(change.mean())
    if "text" in on:
        found |= _neutral_text(on["text"], half)
    if "questions" in on:
        found |= _accuracy(on["questions"], off["questions"], half)
    if "answers" in on:
        found |= _text_quality(on["answers"], half)
    return PointMetrics(dial, **{name: value for name, value in found.items() if not math.isnan(value)})


def _probe_gap(on: RawMeasurement, off: RawMeasurement, half: ItemHalf) -> dict[str, float]:
    change = _array(on["gaps"], half) - _array(off["gaps"], half)
    return {"gap": float(change.mean()), "gap_error": _standard_error(change)}


def _neutral_text(text: RawMeasurement, half: ItemHalf) -> dict[str, float]:
    kl, log_p = (np.concatenate(_items(text[key], half)) for key in ("kl", "log_p"))
    passages = np.array([np.mean(each) for each in _items(text["kl"], half)])
    return {
        "kl": float(kl.mean()),
        "kl_error": _standard_error(passages),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "perplexity": math.exp(-log_p.mean()),
    }


def _accuracy(on: RawMeasurement, off: RawMeasurement, half: ItemHalf) -> dict[str, float]:
    now, before = (_items(each["scores"], half) for each in (on, off))
    right, was_right, sure = is_correct(now), is_correct(before), float(confidence(now).mean())
    return {
        "accuracy": float(right.mean()),
        "retention": _ratio(right.sum(), was_right.sum()),
        "retention_error": _ratio(math.sqrt((right != was_right).sum()), was_right.sum()),
        "confidence": sure,
        "confidence_kept": _ratio(sure, float(confidence(before).mean())),
    }


def _text_quality(answers: RawMeasurement, half: ItemHalf) -> dict[str, float]:
    texts = _items(answers["texts"], half)
    perplexities = np.exp(-_array(answers["log_p"], half))
    repetitions = np.array([text_quality.repetition(each) for each in texts])
    strict = [text_quality.violates_strictly(p, r) for p, r in zip(perplexities, repetitions, strict=True)]
    return {
        "answer_perplexity": float(np.exp(np.log(perplexities).mean())),
        "repetition": float(repetitions.mean()),
        "repetition_error": _standard_error(repetitions),
        "language": float(np.mean([text_quality.language_consistency(each) for each in texts])),
        "compression": float(np.mean([text_quality.compression_ratio(each) for each in texts])),
        "violations": float(np.mean([text_quality.violates(each) for each in perplexities])),
        "strict_violations": float(np.mean(strict)),
    }


def _shift(on: RawMeasurement, off: RawMeasurement, half: ItemHalf) -> float:
    """Mean over sites of how far both classes moved along b1, over how far they lie apart unsteered."""
    now = {side: _array(on[side], half).mean(0) for side in ("positive", "negative")}
    before = {side: _array(off[side], half).mean(0) for side in ("positive", "negative")}
    apart = before["positive"] - before["negative"]
    moved = (now["positive"] - before["positive"] + now["negative"] - before["negative"]) / 2
    # Held-out prompts need not lie apart where the calibrated ones did; the mean over sites must not divide by that.
    size = float(np.abs(apart).mean())
    return float(moved.mean()) / size if size > 0 else math.nan


def _items(items: Sequence[Any], half: ItemHalf) -> Sequence[Any]:
    return items if half is None else items[half::2]


def _array(items: Sequence[Any], half: ItemHalf) -> NDArray[np.float64]:
    return np.array(_items(items, half), np.float64)


def _ratio(now: float, before: float) -> float:
    return float(now / before) if before > 0 else math.nan


def _standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean of n values, (n,); NaN for fewer than 2."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
