"""From a model and prompts to a steering that is ready for use: recorded, its sites chosen, its dial measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from edge_steer.calibration.cached_recorder import CachedRecorder
from edge_steer.calibration.classes import passes
from edge_steer.calibration.dial import find_dial, has_range, with_provisional_range
from edge_steer.calibration.engines import CalibrationEngine
from edge_steer.calibration.site_choice import (
    RECORDED_SITES,
    CalibrationSplit,
    calibrate_candidates,
    choose_best,
    format_table,
    measurement_count,
)
from edge_steer.calibration.steering import calibrate
from edge_steer.calibration.sums import Recorder
from edge_steer.chat_template import PLAIN_TEMPLATE_NOTE
from edge_steer.choices import Mask, Operator, Plane
from edge_steer.export.progress import Progress, no_progress
from edge_steer.measure.divergence import Divergence
from edge_steer.measure.evaluation_set import pick_evenly
from edge_steer.measure.measured_model import MeasuredModel
from edge_steer.measure.metrics import probe_gaps
from edge_steer.preset import APOLOGY, load_axis, load_preset, preset_names
from edge_steer.prompt_files import prompt_set
from edge_steer.prompts import PromptSet
from edge_steer.steering import Steering

REFUSAL = "refusal"
_REFUSALS = 16  # prompts of each class of the preset, from which its direction is made
_REFUSAL_PROBES = 6
_NEAR_REFUSING = 0.5  # nats per token


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user asks of calibration; None: as measured best. orthogonal_to: what is projected out; None: refusals and
    apologies, where the model is near refusing (`is_near_refusing`).

    dial: whether a default angle and a provisional range are measured.
    """

    operator: Operator = "selective"
    plane: Plane | None = None
    sites: str | None = None
    layers: tuple[int, int] | None = None
    mask: Mask | None = None
    orthogonal_to: Sequence[PromptSet | Steering] | None = ()
    dial: bool = True

    @property
    def chooses_sites(self) -> bool:
        """Whether sites and planes are chosen by measurement."""
        free = self.sites in (None, "auto") and self.plane is None and self.layers is None
        return free and self.dial and self.operator in ("selective", "addition")

    @property
    def sites_to_record(self) -> str:
        """The sites to record, as Architecture.kinds_for takes them."""
        if self.chooses_sites:
            return RECORDED_SITES
        if self.sites not in (None, "auto"):
            return str(self.sites)
        return {"shared": "layer_out"}.get(self.plane or "local", "pre")


def load_prompts(
    preset: str | None, positive: str | None, negative: str | None, name: str, limit: int | None = None
) -> PromptSet:
    """A preset's prompts, or those of two files under `name`; of each side the first `limit`."""
    prompts = load_preset(preset) if preset is not None else prompt_set(str(positive), str(negative), name)
    return prompts.first(limit) if limit else prompts


def load_axes(given: Sequence[str], preset: str | None) -> list[PromptSet | Steering] | None:
    """What is projected out of the directions of `preset`: presets by name, steerings by file, nothing for `none`; None
    for what calibration finds best, where nothing is given."""
    if not given:
        return None if preset not in (None, REFUSAL) else []
    if tuple(given) == ("none",):
        return []
    return [load_axis(each) if each in (*preset_names(), APOLOGY) else Steering.load(each) for each in given]


def is_near_refusing(model: MeasuredModel) -> bool:
    """Whether the unsteered model finds refusals of harmless requests likely: then a turn of the mood is apt to end in
    one. Measured as the gap of the refusal preset's probes, refusing minus complying, nats per token."""
    probes = pick_evenly(load_preset(REFUSAL).probes, _REFUSAL_PROBES)
    return float(probe_gaps(model, probes).mean()) > _NEAR_REFUSING


def _silent(_: str) -> None:
    """No notes."""


def calibrate_model(
    engine: CalibrationEngine,
    prompts: PromptSet,
    options: CalibrationOptions | None = None,
    *,
    name: str | None = None,
    progress: Progress = no_progress,
    note: Callable[[str], object] = _silent,
) -> Steering:
    """The steering of `prompts` on the engine's model, its sites chosen and its dial measured as `options` has it.

    Raises SteerError if the prompts allow none, or what is found changes nothing.
    """
    options = options or CalibrationOptions()
    with closing(engine):
        recorder = engine.open_recorder(options.sites_to_record)
        for line in prompts.warnings():
            note(line)
        if engine.uses_plain_template():
            note(PLAIN_TEMPLATE_NOTE)
        if options.orthogonal_to is None:
            options = replace(options, orthogonal_to=_refusal_axes(engine.unsteered_model(), note))
        if options.chooses_sites:
            steering = _choose_sites(engine, CachedRecorder(recorder), prompts, options, progress, note)
            steering = steering.with_(name=prompts.name if name is None else name)
        else:
            steering = _calibrate_at_sites(recorder, prompts, options, name, progress, note)
            if not options.dial or not has_range(steering):
                return steering
            steering = _measure_dial(engine, steering, progress)
        note(_describe_range(steering))
        return steering


def _refusal_axes(model: MeasuredModel, note: Callable[[str], object]) -> tuple[PromptSet, ...]:
    """Refusals and apologies where the model is near refusing, to be projected out."""
    if not is_near_refusing(model):
        return ()
    note("this model is near refusing: refusals and apologies are projected out (--orthogonal-to)")
    return (load_preset(REFUSAL).first(_REFUSALS), load_axis(APOLOGY))


def _choose_sites(
    engine: CalibrationEngine,
    recorder: Recorder,
    prompts: PromptSet,
    options: CalibrationOptions,
    progress: Progress,
    note: Callable[[str], object],
) -> Steering:
    """The best candidate's steering, with its provisional range."""
    split, axes = CalibrationSplit.of(prompts), options.orthogonal_to or ()
    with progress("recording", passes(split.prompts, axes)) as step:
        steerings = calibrate_candidates(
            recorder, split.prompts, operator=options.operator, mask=options.mask,
            orthogonal_to=axes, step=step, note=note,
        )  # fmt: skip
    with progress("choosing sites", measurement_count(len(steerings))) as step:
        steering, found = choose_best(engine.open_steered(list(steerings.values())), steerings, split, step=step)
    for line in format_table(found):
        note(line)
    return steering


def _calibrate_at_sites(
    recorder: Recorder,
    prompts: PromptSet,
    options: CalibrationOptions,
    name: str | None,
    progress: Progress,
    note: Callable[[str], object],
) -> Steering:
    """The steering at the sites that the options name, without a dial."""
    named = options.sites not in (None, "auto")
    axes = options.orthogonal_to or ()
    with progress("recording", passes(prompts, axes)) as step:
        return calibrate(
            recorder, prompts, plane=options.plane or "local", operator=options.operator, mask=options.mask,
            kinds={site.kind for site in recorder.sites} if named or options.plane == "shared" else None,
            layers=options.layers, orthogonal_to=axes, name=name, step=step, note=note,
        )  # fmt: skip


def _measure_dial(engine: CalibrationEngine, steering: Steering, progress: Progress) -> Steering:
    """The steering with its provisional range."""
    with progress("measuring the dial", 2) as step:
        divergence = Divergence(engine.open_steered([steering]))
        high = find_dial(divergence, steering, 1)
        step(1)
        low = find_dial(divergence, steering, -1, first=high.angle)
        step(1)
    return with_provisional_range(steering, low, high)


def _describe_range(steering: Steering) -> str:
    unit = "" if steering.operator == "addition" else "°"
    return (
        f"default {steering.angle:+g}{unit}, provisional range {steering.angle_min:+g}{unit} … "
        f"{steering.angle_max:+g}{unit}; `edge-steer sweep --write` measures the safe one"
    )
