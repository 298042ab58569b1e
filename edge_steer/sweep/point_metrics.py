"""From raw parts to the figures of one position of the dial: plain arithmetic, told as change from off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.measure import text_quality
from edge_steer.measure.capability import confidence, correct
from edge_steer.sweep.measurements import Part

Parts = Mapping[str, Part]  # by name
Half = int | None  # 0: the 1st, 3rd, 5th … of all items; 1: the 2nd, 4th …; None: all


@dataclass(frozen=True)
class Figures:
    """One position of the dial; None where a part was not measured. `dial` None is off.

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
    def whole(self) -> bool:
        """Whether all that a budget asks for was measured."""
        return None not in (self.kl, self.retention, self.repetition)

    def record(self) -> dict[str, Any]:
        """For JSON and CSV."""
        return {"dial": self.dial, "effect": self.effect, **asdict(self)}


def figures(dial: float | None, on: Parts, off: Parts, half: Half = None) -> Figures:
    """The figures of the parts measured at `dial`, against those measured off; of one half of the items if asked."""
    found: dict[str, float] = {}
    if "probes" in on:
        change = _array(on["probes"]["gaps"], half) - _array(off["probes"]["gaps"], half)
        found["gap"] = float(change.mean())
        found["gap_error"] = float(change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else math.nan
    if "held_out" in on:
        found["shift"] = _shift(on["held_out"], off["held_out"], half)
    if "reading" in on:
        change = _array(on["reading"]["self_read"], half) - _array(off["reading"]["self_read"], half)
        found["self_read"] = float(change.mean())
    if "text" in on:
        kl, log_p = (np.concatenate(_items(on["text"][key], half)) for key in ("kl", "log_p"))
        passages = np.array([np.mean(each) for each in _items(on["text"]["kl"], half)])
        found["kl_error"] = passages.std(ddof=1) / math.sqrt(len(passages)) if len(passages) > 1 else math.nan
        found |= {
            "kl": float(kl.mean()), "kl_p99": float(np.quantile(kl, 0.99)), "perplexity": math.exp(-log_p.mean()),
        }  # fmt: skip
    if "questions" in on:
        now, before = (_items(each["questions"]["scores"], half) for each in (on, off))
        right, was_right, sure = correct(now), correct(before), float(confidence(now).mean())
        found |= {
            "accuracy": float(right.mean()),
            "retention": _over(right.sum(), was_right.sum()),
            "retention_error": _over(math.sqrt((right != was_right).sum()), was_right.sum()),
            "confidence": sure,
            "confidence_kept": _over(sure, float(confidence(before).mean())),
        }
    if "answers" in on:
        found |= _coherence(on["answers"], half)
    return Figures(dial, **{name: value for name, value in found.items() if not math.isnan(value)})


def _coherence(part: Part, half: Half) -> dict[str, float]:
    texts = _items(part["texts"], half)
    perplexities = np.exp(-_array(part["log_p"], half))
    repetitions = np.array([text_quality.repetition(each) for each in texts])
    strict = [text_quality.violates_strictly(p, r) for p, r in zip(perplexities, repetitions, strict=True)]
    return {
        "answer_perplexity": float(np.exp(np.log(perplexities).mean())),
        "repetition": float(repetitions.mean()),
        "repetition_error": float(repetitions.std(ddof=1) / math.sqrt(len(texts))) if len(texts) > 1 else math.nan,
        "language": float(np.mean([text_quality.language_consistency(each) for each in texts])),
        "compression": float(np.mean([text_quality.compression_ratio(each) for each in texts])),
        "violations": float(np.mean([text_quality.violates(each) for each in perplexities])),
        "strict_violations": float(np.mean(strict)),
    }


def _shift(on: Part, off: Part, half: Half) -> float:
    """Mean over sites of how far both classes moved along b1, over how far they lie apart unsteered."""
    now = {side: _array(on[side], half).mean(0) for side in ("positive", "negative")}
    before = {side: _array(off[side], half).mean(0) for side in ("positive", "negative")}
    apart = before["positive"] - before["negative"]
    moved = (now["positive"] - before["positive"] + now["negative"] - before["negative"]) / 2
    # Held-out prompts need not lie apart where the calibrated ones did; the mean over sites must not divide by that.
    size = float(np.abs(apart).mean())
    return float(moved.mean()) / size if size > 0 else math.nan


def _items(items: Sequence[Any], half: Half) -> Sequence[Any]:
    return items if half is None else items[half::2]


def _array(items: Sequence[Any], half: Half) -> NDArray[np.float64]:
    return np.array(_items(items, half), np.float64)


def _over(now: float, before: float) -> float:
    return float(now / before) if before > 0 else math.nan
