"""How far apart two engines are, and whether that is near enough.

KL in nats per token. Letters: n tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_steer.measure.metrics import log_softmax
from edge_steer.verify.engine_runs import Logits

_ROWS = 16


@dataclass(frozen=True)
class Tolerance:
    """How far apart two engines may be in mean KL, and in the largest difference of logits (None: not judged)."""

    kl: float
    logits: float | None


# By the coarsest type of the model's weights. Where two engines are further apart unsteered, twice that is allowed.
TOLERANCES = {
    # Nothing is rounded but the sums, which each engine takes in another order.
    "F32": Tolerance(1e-5, 2e-2),
    # llama.cpp rounds activations to 11 bits before each product: Rh for the hook, h for the others.
    "F16": Tolerance(1e-4, None),
    # The same to 8 bits; and a baked weight is rounded to them a second time.
    "BF16": Tolerance(2e-3, None),
    # The same to 8 bits in blocks of 32 or 256.
    "quantized": Tolerance(1e-2, None),
}


@dataclass(frozen=True)
class Distance:
    """Between logits: the largest difference, the mean KL(one‖other), the share of tokens with the same favourite."""

    logits: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Effect:
    """What an engine changes: from the same model unsteered. kept: the part that is the hook's change, 1 for all of it.

    kept is Σp ΔΔₕ / Σp Δₕ², with Δ the change of log-probabilities, Δₕ the hook's and p the unsteered probabilities.
    """

    changed: Distance
    kept: float


@dataclass(frozen=True)
class Comparison:
    """Two engines, steered. unsteered: how far apart their weights are with everything off, where that was measured."""

    one: str
    other: str
    steered: Distance
    unsteered: Distance | None
    limit: Tolerance

    @property
    def passed(self) -> bool:
        near = self.limit.logits is None or self.steered.logits <= self.limit.logits
        return near and self.steered.kl <= self.limit.kl


@dataclass(frozen=True)
class EngineRun:
    """An engine's logits. unsteered: those of its weights with everything off, None where they have no such form.

    plain: those of the model that it changes.
    """

    steered: Logits
    unsteered: Logits | None
    plain: Logits


def compare_runs(
    one: str, other: str, runs: dict[str, EngineRun], floor: Tolerance, noise: Distance | None, effect: Distance
) -> Comparison:
    steered = measure_distance(runs[one].steered, runs[other].steered)
    a, b = runs[one].unsteered, runs[other].unsteered
    if a is None or b is None:
        # Baked and not to be undone, it must be nearer to what it stands for than the unsteered model is.
        return Comparison(one, other, steered, None, Tolerance(effect.kl, None))
    unsteered = noise if a is b else measure_distance(a, b)
    if unsteered is None:
        return Comparison(one, other, steered, None, floor)
    logits = None if floor.logits is None else max(floor.logits, 2 * unsteered.logits)
    return Comparison(one, other, steered, unsteered, Tolerance(max(floor.kl, 2 * unsteered.kl), logits))


def measure_effect(run: EngineRun, hook: EngineRun) -> Effect:
    columns = min(run.steered.shape[1], hook.steered.shape[1])
    along = size = 0.0
    for first in range(0, len(run.steered), _ROWS):
        steered, plain, hooked, unhooked = (
            log_softmax(np.asarray(logits[first : first + _ROWS, :columns], np.float64))
            for logits in (run.steered, run.plain, hook.steered, hook.plain)
        )
        weighed = np.exp(unhooked) * (hooked - unhooked)
        along += float((weighed * (steered - plain)).sum())
        size += float((weighed * (hooked - unhooked)).sum())
    return Effect(measure_distance(run.plain, run.steered), along / size if size else float("nan"))


def measure_distance(one: Logits, other: Logits) -> Distance:
    """How far apart logits (n, V) are; columns that only one has, of a padded vocabulary, are left out."""
    columns = min(one.shape[1], other.shape[1])
    largest = kl = same = 0.0
    for first in range(0, len(one), _ROWS):
        a, b = (np.asarray(each[first : first + _ROWS, :columns], np.float64) for each in (one, other))
        largest = max(largest, float(np.abs(a - b).max()))
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        p, q = log_softmax(a), log_softmax(b)
        kl += float((np.exp(p) * (p - q)).sum())
    return Distance(largest, kl / len(one), same / len(one))
