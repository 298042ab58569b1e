"""The engines against each other on one model: hook, adapter, baked weights, and transformers where it is given.

KL in nats per token. Letters: n tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import MismatchError, NoEffectError, SteerError
from edge_steer.export import ggml
from edge_steer.export.folding import EMBEDDING, fold_gguf
from edge_steer.export.gguf_bytes import map_model, size_of
from edge_steer.export.halves import check_adapter
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled, linear_actions
from edge_steer.gguf_metadata import TensorInfo
from edge_steer.model_file import ModelFile, read_model
from edge_steer.verify.engine_runs import Bench, Logits, identity, undoing

_LARGEST_F32 = 4 << 30  # bytes of steered weights beyond which they are not written out as F32
_OTHER_MODEL = 1.0  # unsteered KL beyond which a directory is not what a GGUF was made from
_KEPT = 0.9  # share of the steering below which a baked model is worth a note
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
class Verification:
    """What `verify` found. weights: the commonest type of the model's. effects: by engine.

    rounding: what writing the baked weights in their own types cost, by type, relative. notes: what to know beside.
    """

    weights: str
    tokens: int
    effects: dict[str, Effect]
    comparisons: tuple[Comparison, ...]
    rounding: dict[str, float]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)


@dataclass(frozen=True)
class _Run:
    """An engine's logits. unsteered: those of its weights with everything off, None where they have no such form.

    plain: those of the model that it changes.
    """

    steered: Logits
    unsteered: Logits | None
    plain: Logits


def verify(
    model_path: str | Path,
    steerings: Sequence[Dialled],
    *,
    hf: str | Path | None = None,
    tokens: int = 256,
    progress: Progress = no_progress,
    **llama: Any,
) -> Verification:
    """Compare, pair by pair, all engines that can do these steerings to the GGUF `model_path`, on `tokens` tokens.

    hf: the Hugging Face directory that the GGUF was made from, to compare with transformers. llama: parameters of
    llama_cpp.Llama. Baked models are written to the temporary folder, one at a time.
    Raises SteerError where only the hook can do them and there is no `hf`.
    """
    model = read_model(model_path)
    on = [(steering, dial) for steering, dial in steerings if steering.action(dial) is not None]
    if not on:
        raise NoEffectError("every steering is off, so there is nothing to compare; give an angle: -s FILE:8")
    for steering, _ in on:
        steering.check_fits(model.base)
    notes: list[str] = []
    readers, no_adapter, reason = _changed(model, on)
    if reason and hf is None:
        raise SteerError(f"nothing to compare the hook with: {reason}; give --hf DIR for transformers")
    if reason:
        notes.append(f"no adapter and no baked weights: {reason}")
    if no_adapter:
        notes.append(f"no adapter: {no_adapter}")
    quantized = any(ggml.is_quantized(tensor.type) for tensor in readers)
    as_f32 = quantized and sum(4 * int(np.prod(tensor.shape)) for tensor in readers) <= _LARGEST_F32
    if quantized and not as_f32:
        notes.append("the baked weights were not compared as F32, in which they would be too large")

    total = 2 + (not reason) + (not reason and not no_adapter) + 2 * as_f32 + 2 * (hf is not None)
    runs: dict[str, _Run] = {}
    rounding: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="edge-steer-", ignore_cleanup_errors=True) as folder,
        progress("comparing", total) as step,
    ):
        bench = Bench.open(model, tokens, Path(folder), llama)

        def done(logits: Logits) -> Logits:
            step(1)
            return logits

        plain = done(bench.run("hook", ()))
        runs["hook"] = _Run(done(bench.run("hook", on)), plain, plain)
        noise = None
        if not reason:
            if not no_adapter:
                runs["lora"] = _Run(done(bench.run("lora", on)), plain, plain)
            # Undone by the hook, quantized weights are those of the model but for their second rounding. Where nothing
            # is quantized there is none to speak of, and the unsteered model says more: it does not hang on the bake.
            baked = bench.run_baked(on, back=undoing(on) if quantized else ())
            runs["baked"] = _Run(done(baked.logits), baked.back if quantized else plain, plain)
            rounding = baked.rounding
        if as_f32:
            unsteered = done(bench.run_baked([identity(on)], "F32").logits)
            runs["baked F32"] = _Run(done(bench.run_baked(on, "F32").logits), unsteered, unsteered)
            # What rounding activations does: all that tells two engines on the same quantized weights apart.
            noise = distance(plain, unsteered)
        if hf is not None:
            torch, torch_plain = map(done, bench.run_torch(hf, on))
            _check_same_model(model.path, hf, torch_plain, plain)
            runs["torch"] = _Run(torch, torch_plain, torch_plain)

        effects = {name: _effect(run, runs["hook"]) for name, run in runs.items()}
        effect = effects["hook"].changed
        weights, tolerance = _weights(model)
        comparisons = tuple(
            _compare(one, other, runs, TOLERANCES[tolerance], noise, effect) for one, other in combinations(runs, 2)
        )
    if any(each.limit.kl >= effect.kl and "baked" not in (each.one, each.other) for each in comparisons):
        notes.append(f"this changes so little (KL {effect.kl:.1e}) that the limits tell little; give a larger angle")
    if not reason and effects["baked"].kept < _KEPT:
        notes.append(
            f"baked into {weights} weights, {effects['baked'].kept:.0%} of the steering is left: rounding takes back a "
            "part of so small a turn; export with --steered-type Q8_0, or bake it in before quantizing (convert -s)"
        )
    return Verification(weights, len(bench.text) - 1, effects, comparisons, rounding, tuple(notes))


def _compare(
    one: str, other: str, runs: dict[str, _Run], floor: Tolerance, noise: Distance | None, effect: Distance
) -> Comparison:
    steered = distance(runs[one].steered, runs[other].steered)
    a, b = runs[one].unsteered, runs[other].unsteered
    if a is None or b is None:
        # Baked and not to be undone, it must be nearer to what it stands for than the unsteered model is.
        return Comparison(one, other, steered, None, Tolerance(effect.kl, None))
    unsteered = noise if a is b else distance(a, b)
    if unsteered is None:
        return Comparison(one, other, steered, None, floor)
    logits = None if floor.logits is None else max(floor.logits, 2 * unsteered.logits)
    return Comparison(one, other, steered, unsteered, Tolerance(max(floor.kl, 2 * unsteered.kl), logits))


def _effect(run: _Run, hook: _Run) -> Effect:
    columns = min(run.steered.shape[1], hook.steered.shape[1])
    along = size = 0.0
    for first in range(0, len(run.steered), _ROWS):
        steered, plain, hooked, unhooked = (
            _log_softmax(np.asarray(logits[first : first + _ROWS, :columns], np.float64))
            for logits in (run.steered, run.plain, hook.steered, hook.plain)
        )
        weighed = np.exp(unhooked) * (hooked - unhooked)
        along += float((weighed * (steered - plain)).sum())
        size += float((weighed * (hooked - unhooked)).sum())
    return Effect(distance(run.plain, run.steered), along / size if size else float("nan"))


def distance(one: Logits, other: Logits) -> Distance:
    """How far apart logits (n, V) are; columns that only one has, of a padded vocabulary, are left out."""
    columns = min(one.shape[1], other.shape[1])
    largest = kl = same = 0.0
    for first in range(0, len(one), _ROWS):
        a, b = (np.asarray(each[first : first + _ROWS, :columns], np.float64) for each in (one, other))
        largest = max(largest, float(np.abs(a - b).max()))
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        p, q = _log_softmax(a), _log_softmax(b)
        kl += float((np.exp(p) * (p - q)).sum())
    return Distance(largest, kl / len(one), same / len(one))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    # In float64, unlike that of metrics.py: the KL of two exact engines is below what float32 resolves.
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _changed(model: ModelFile, on: Sequence[Dialled]) -> tuple[list[TensorInfo], str, str]:
    """The weights that the steerings change; or none, and the reason why weights cannot do these steerings."""
    try:
        linear_actions(on)
        folded = fold_gguf([steering for steering, _ in on], map_model(model))
    except SteerError as error:
        return [], "", str(error)
    no_adapter = ""
    try:
        check_adapter(folded)
    except SteerError as error:
        no_adapter = str(error)
    heads = {EMBEDDING} if folded.untied else set()
    return [tensor for tensor in model.tensors if tensor.name in {*folded.weights, *heads}], no_adapter, ""


def _weights(model: ModelFile) -> tuple[str, str]:
    """The type that most bytes of the model's matrices have, and the tolerance for the coarsest among them."""
    size: Counter[int] = Counter()
    for tensor in model.tensors:
        if len(tensor.shape) > 1:
            size[tensor.type] += size_of(tensor)
    names = {ggml.type_name(kind) for kind in size}
    coarsest = next((name for name in ("BF16", "F16", "F32") if name in names), "F32")
    return (
        ggml.type_name(size.most_common(1)[0][0]),
        "quantized" if any(ggml.is_quantized(kind) for kind in size) else coarsest,
    )


def _check_same_model(path: Path, hf: str | Path, torch: Logits, plain: Logits) -> None:
    apart = distance(plain, torch).kl
    if apart > _OTHER_MODEL:
        raise MismatchError(
            f"expected in {hf} what {path} was made from, got a model whose unsteered predictions are a KL of "
            f"{apart:.2f} away; give another directory"
        )
