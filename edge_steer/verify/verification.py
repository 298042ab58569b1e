"""The engines against each other on one model: hook, adapter, baked weights, and transformers where it is given.

KL in nats per token.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from edge_steer import tensor_types
from edge_steer.errors import MismatchError, NoEffectError, SteerError
from edge_steer.export.folding import EMBEDDING, fold_gguf
from edge_steer.export.gguf_bytes import map_model, size_of
from edge_steer.export.halves import check_adapter
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled, linear_actions
from edge_steer.gguf_tensors import TensorInfo
from edge_steer.model_file import ModelFile, read_model
from edge_steer.verify.comparison import (
    TOLERANCES,
    Comparison,
    Effect,
    EngineRun,
    compare_runs,
    measure_distance,
    measure_effect,
)
from edge_steer.verify.engine_runs import EngineRunner, Logits, identity_steering, inverse_steerings

_LARGEST_F32 = 4 << 30  # bytes of steered weights beyond which they are not written out as F32
_OTHER_MODEL = 1.0  # unsteered KL beyond which a directory is not what a GGUF was made from
_KEPT = 0.9  # share of the steering below which a baked model is worth a note


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
    Raises SteerError if only the hook can do them and there is no `hf`.
    """
    model = read_model(model_path)
    on = [(steering, dial) for steering, dial in steerings if steering.action(dial) is not None]
    if not on:
        raise NoEffectError("every steering is off, so there is nothing to compare; give an angle: -s FILE:8")
    for steering, _ in on:
        steering.check_fits(model.base)
    plan = _plan(model, on)
    if plan.no_weights and hf is None:
        raise SteerError(f"nothing to compare the hook with: {plan.no_weights}; give --hf DIR for transformers")
    with (
        tempfile.TemporaryDirectory(prefix="edge-steer-", ignore_cleanup_errors=True) as folder,
        progress("comparing", plan.count_runs(hf)) as step,
    ):
        runner = EngineRunner.open(model, tokens, Path(folder), llama)
        runs, rounding = _run_engines(runner, on, plan, hf, step)
        effects = {name: measure_effect(run, runs["hook"]) for name, run in runs.items()}
        effect = effects["hook"].changed
        # What rounding activations does: all that tells two engines on the same quantized weights apart.
        noise = measure_distance(runs["hook"].plain, runs["baked F32"].plain) if plan.as_f32 else None
        weights, tolerance = _weight_types(model)
        comparisons = tuple(
            compare_runs(one, other, runs, TOLERANCES[tolerance], noise, effect) for one, other in combinations(runs, 2)
        )
    notes = (*plan.notes, *_notes_on_effects(weights, effects, comparisons))
    return Verification(weights, len(runner.text) - 1, effects, comparisons, rounding, notes)


@dataclass(frozen=True)
class _Plan:
    """Which engines can do the steerings. no_weights, no_adapter: why baked weights and adapters, or adapters alone,
    cannot; empty where they can. quantized: of the weights that change. as_f32: bake them as F32 as well."""

    no_weights: str
    no_adapter: str
    quantized: bool
    as_f32: bool

    @property
    def adapter(self) -> bool:
        return not self.no_weights and not self.no_adapter

    def count_runs(self, hf: str | Path | None) -> int:
        """How many steps `_run_engines` reports."""
        return 2 + (not self.no_weights) + self.adapter + 2 * self.as_f32 + 2 * (hf is not None)

    @property
    def notes(self) -> list[str]:
        notes = [f"no adapter and no baked weights: {self.no_weights}"] if self.no_weights else []
        notes += [f"no adapter: {self.no_adapter}"] if self.no_adapter else []
        if self.quantized and not self.as_f32:
            notes.append("the baked weights were not compared as F32, in which they would be too large")
        return notes


def _plan(model: ModelFile, on: Sequence[Dialled]) -> _Plan:
    changed, no_adapter, no_weights = _weights_to_change(model, on)
    quantized = any(tensor_types.is_quantized(tensor.type) for tensor in changed)
    as_f32 = quantized and sum(4 * int(np.prod(tensor.shape)) for tensor in changed) <= _LARGEST_F32
    return _Plan(no_weights, no_adapter, quantized, as_f32)


def _run_engines(
    runner: EngineRunner, on: Sequence[Dialled], plan: _Plan, hf: str | Path | None, step: Callable[[int], None]
) -> tuple[dict[str, EngineRun], dict[str, float]]:
    """The runs by engine, and what writing the baked weights in their own types cost."""

    def done(logits: Logits) -> Logits:
        step(1)
        return logits

    plain = done(runner.run("hook", ()))
    runs = {"hook": EngineRun(done(runner.run("hook", on)), plain, plain)}
    rounding: dict[str, float] = {}
    if plan.adapter:
        runs["lora"] = EngineRun(done(runner.run("lora", on)), plain, plain)
    if not plan.no_weights:
        # Undone by the hook, quantized weights are those of the model but for their second rounding. Where nothing
        # is quantized there is none to speak of, and the unsteered model says more: it does not depend on baking.
        baked = runner.run_baked(on, undo=inverse_steerings(on) if plan.quantized else ())
        runs["baked"] = EngineRun(done(baked.logits), baked.undone if plan.quantized else plain, plain)
        rounding = baked.rounding
    if plan.as_f32:
        unsteered = done(runner.run_baked([identity_steering(on)], "F32").logits)
        runs["baked F32"] = EngineRun(done(runner.run_baked(on, "F32").logits), unsteered, unsteered)
    if hf is not None:
        torch, torch_plain = map(done, runner.run_torch(hf, on))
        _check_same_model(runner.model.path, hf, torch_plain, plain)
        runs["torch"] = EngineRun(torch, torch_plain, torch_plain)
    return runs, rounding


def _notes_on_effects(weights: str, effects: dict[str, Effect], comparisons: Sequence[Comparison]) -> Iterator[str]:
    """What the numbers cannot tell, or tell of the steering rather than of the engines."""
    kl = effects["hook"].changed.kl
    if any(each.limit.kl >= kl and "baked" not in (each.one, each.other) for each in comparisons):
        yield f"this changes so little (KL {kl:.1e}) that the limits tell little; give a larger angle"
    if "baked" in effects and effects["baked"].kept < _KEPT:
        yield (
            f"baked into {weights} weights, {effects['baked'].kept:.0%} of the steering is left: rounding takes back a "
            "part of so small a turn; export with --steered-type Q8_0, or bake it in before quantizing (convert -s)"
        )


def _weights_to_change(model: ModelFile, on: Sequence[Dialled]) -> tuple[list[TensorInfo], str, str]:
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


def _weight_types(model: ModelFile) -> tuple[str, str]:
    """The type that most bytes of the model's matrices have, and the tolerance for the coarsest among them."""
    size: Counter[int] = Counter()
    for tensor in model.tensors:
        if len(tensor.shape) > 1:
            size[tensor.type] += size_of(tensor)
    names = {tensor_types.type_name(kind) for kind in size}
    coarsest = next((name for name in ("BF16", "F16", "F32") if name in names), "F32")
    return (
        tensor_types.type_name(size.most_common(1)[0][0]),
        "quantized" if any(tensor_types.is_quantized(kind) for kind in size) else coarsest,
    )


def _check_same_model(path: Path, hf: str | Path, torch: Logits, plain: Logits) -> None:
    apart = measure_distance(plain, torch).kl
    if apart > _OTHER_MODEL:
        raise MismatchError(
            f"expected in {hf} what {path} was made from, got a model whose unsteered predictions are a KL of "
            f"{apart:.2f} away; give another directory"
        )
