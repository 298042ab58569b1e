"""A sweep from a user's files to a folder of results; stopped, it goes on from what the folder holds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_steer.calibration import passes
from edge_steer.calibration.cached_recorder import CachedRecorder
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.chat_template import PLAIN_TEMPLATE_NOTE
from edge_steer.export.progress import Progress
from edge_steer.measure.evaluation_set import QUICK_SIZES, EvaluationSet, EvaluationSizes, build_evaluation_set
from edge_steer.prompts import PromptSet
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.together import SEQUENCES
from edge_steer.steering import Steering, save_all
from edge_steer.sweep.budget import Budget
from edge_steer.sweep.curve import Curve, with_safe_range
from edge_steer.sweep.inputs import SweepInputs
from edge_steer.sweep.journal import Journal
from edge_steer.sweep.measurements import ModelUnderTest
from edge_steer.sweep.methods import RECORDED_SITES, calibrate_methods, check_methods
from edge_steer.sweep.outputs import JOURNAL, write_outputs
from edge_steer.sweep.search import QUICK_SIZE, SweepSize
from edge_steer.sweep.sweep import Report, Sweep, journal_settings

Note = Callable[[str], object]


@dataclass(frozen=True)
class SweepOptions:
    """methods: to calibrate where the inputs hold no steerings. dials: to measure; empty: those that are found.
    max_kl, min_retention: of the budget. store_in: the steering file that gets the safe ranges."""

    methods: tuple[str, ...] = ()
    dials: tuple[float, ...] = ()
    quick: bool = False
    max_kl: float = 0.25
    min_retention: float = 0.97
    store_in: str | None = None
    force: bool = False


def run_sweep(
    inputs: SweepInputs,
    path: str,
    parameters: dict[str, Any],
    folder: Path,
    options: SweepOptions,
    *,
    progress: Progress,
    note: Note,
    report: Report,
) -> list[Curve]:
    """Measure the inputs on the GGUF `path`, write `folder`, and return a curve for each steering.

    parameters: of SteeredLlama. note: called with a line. report: as for Sweep.
    """
    begun = time.monotonic()
    steerings = inputs.steerings
    if inputs.prompts is not None:
        steerings = _load_or_calibrate(path, parameters, inputs.prompts, folder, options, progress, note)
    sizes = QUICK_SIZES if options.quick else EvaluationSizes()
    texts = build_evaluation_set(sizes, inputs.probes, inputs.held_out)
    if not texts.probes:
        note("no probes are known for these prompts: the effect is read in the answers; see --probes")
    llm = _open_model(path, steerings, parameters, note)
    budget = Budget(kl=options.max_kl, retention=options.min_retention, errors=2.0, repetition_errors=1.0)
    journal = _open_journal(Path(path), texts, steerings, folder, options.force, note)
    run = Sweep(ModelUnderTest(llm, texts), journal, budget, report=report)
    size = QUICK_SIZE if options.quick else SweepSize()
    try:
        curves = [run.measure_curve(each, size, options.dials) for each in steerings]
    except KeyboardInterrupt:
        note(f"stopped; the same command goes on from the {len(journal)} measurements in {folder}")
        raise
    about = {
        "model": Path(path).name,
        "amounts": vars(sizes),
        "material_sha256": texts.sha256,
        "budget": vars(budget),
        "seconds": round(time.monotonic() - begun, 1),
    }
    write_outputs(curves, budget, about, folder, note)
    if options.store_in is not None:
        save_all([with_safe_range(curve) for curve in curves], options.store_in, force=True)
        note(f"stored the safe range in {options.store_in}")
    return curves


def _load_or_calibrate(
    path: str,
    parameters: dict[str, Any],
    prompts: PromptSet,
    folder: Path,
    options: SweepOptions,
    progress: Progress,
    note: Note,
) -> tuple[Steering, ...]:
    """A steering a method, from one recording; kept in the folder, for the next run and for use."""
    check_methods(options.methods)
    kept = folder / "methods.gguf"
    if kept.exists() and not options.force:
        found = [each for each in Steering.load_all(kept) if each.name in options.methods]
        if {each.name for each in found if each.made.prompts_sha256 == prompts.sha256} == set(options.methods):
            return tuple(found)
    with progress("recording", passes(prompts)) as step:
        recorder = CachedRecorder(NativeRecorder(path, sites=RECORDED_SITES, **parameters))
        made = calibrate_methods(recorder, prompts, options.methods, step, note)
    folder.mkdir(parents=True, exist_ok=True)
    save_all(made, kept, force=True)
    return tuple(Steering.load_all(kept))


def _open_model(path: str, steerings: Sequence[Steering], parameters: dict[str, Any], note: Note) -> SteeredLlama:
    """The model with all steerings, off. That they overlap is no surprise where one is measured at a time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*overlap")
        llm = SteeredLlama(
            path, steering=steerings, angles={each.name: None for each in steerings}, engine="hook",
            sequences=SEQUENCES, **parameters,
        )  # fmt: skip
    if llm.chat_template.is_plain:
        note(PLAIN_TEMPLATE_NOTE)
    return llm


def _open_journal(
    path: Path, texts: EvaluationSet, steerings: Sequence[Steering], folder: Path, force: bool, note: Note
) -> Journal:
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(folder / JOURNAL, journal_settings(path, texts, steerings, "all"), force=force)
    if len(journal):
        note(f"{folder} holds {len(journal)} measurements of this sweep; it goes on from there")
    return journal
