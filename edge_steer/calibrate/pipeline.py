"""From a model and prompts to a steering that is ready for use: recorded, its sites chosen, its dial measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from edge_steer.calibrate import site_choice
from edge_steer.calibrate.cached_recorder import Remembered
from edge_steer.calibrate.dial import dial_at, has_range, with_dials
from edge_steer.calibrate.engines import CalibrationEngine
from edge_steer.calibrate.planes import Mask
from edge_steer.calibrate.steering import calibrate, passes
from edge_steer.calibrate.sums import Recorder
from edge_steer.contrast import PromptSet, load_preset
from edge_steer.export.progress import Progress, no_progress
from edge_steer.measure.divergence import Divergence
from edge_steer.measure.evaluation_set import spread
from edge_steer.measure.measured_model import MeasuredModel
from edge_steer.measure.metrics import probe_gaps
from edge_steer.steering import Operator, Plane, Steering

REFUSAL = "refusal"
_REFUSAL_PROBES = 6
_NEAR = 0.5


@dataclass(frozen=True)
class Wishes:
    """What a user asks of calibration; None: as measured best. orthogonal_to: what is projected out; None: the refusal
    preset, where the model is near refusing (`near_refusing`).

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
    def auto(self) -> bool:
        """Whether sites and planes are chosen by measurement."""
        free = self.sites in (None, "auto") and self.plane is None and self.layers is None
        return free and self.dial and self.operator in ("selective", "addition")

    @property
    def recorded(self) -> str:
        """The sites to record, as Architecture.kinds_for takes them."""
        if self.auto:
            return site_choice.SITES
        if self.sites not in (None, "auto"):
            return str(self.sites)
        return {"shared": "layer_out"}.get(self.plane or "local", "pre")


def near_refusing(model: MeasuredModel) -> bool:
    """Whether the unsteered model finds refusals of harmless requests likely: then a turn of the mood is apt to end in
    one. Measured as the gap of the refusal preset's probes, refusing minus complying, nats per token."""
    probes = spread(load_preset(REFUSAL).probes, _REFUSAL_PROBES)
    return float(probe_gaps(model, probes).mean()) > _NEAR


def _silent(_: str) -> None:
    """No notes."""


def calibrated(
    engine: CalibrationEngine,
    prompts: PromptSet,
    wishes: Wishes | None = None,
    *,
    name: str | None = None,
    progress: Progress = no_progress,
    note: Callable[[str], object] = _silent,
) -> Steering:
    """The steering of `prompts` on the engine's model, its sites chosen and its dial measured as `wishes` has it.

    Raises SteerError where the prompts allow none, or what is found changes nothing.
    """
    wishes = wishes or Wishes()
    with closing(engine):
        recorder = engine.recorder(wishes.recorded)
        for line in prompts.warnings():
            note(line)
        if engine.uses_plain_template():
            note('this model has no chat template; prompts are put as "{prompt}\\nAnswer:"')
        axes = wishes.orthogonal_to
        if axes is None:
            axes = (load_preset(REFUSAL),) if near_refusing(engine.unsteered()) else ()
            if axes:
                note("this model is near refusing: the direction of refusals is projected out (--orthogonal-to)")
        if wishes.auto:
            return _chosen(
                engine, Remembered(recorder), prompts, replace(wishes, orthogonal_to=axes), name, progress, note
            )
        named = wishes.sites not in (None, "auto")
        with progress("recording", passes(prompts, axes)) as step:
            steering = calibrate(
                recorder, prompts, plane=wishes.plane or "local", operator=wishes.operator, mask=wishes.mask,
                kinds={site.kind for site in recorder.sites} if named or wishes.plane == "shared" else None,
                layers=wishes.layers, orthogonal_to=axes, name=name, step=step, note=note,
            )  # fmt: skip
        if not wishes.dial or not has_range(steering):
            return steering
        with progress("measuring the dial", 2) as step:
            divergence = Divergence(engine.open([steering]))
            high = dial_at(divergence, steering, 1)
            step(1)
            low = dial_at(divergence, steering, -1, first=high.angle)
            step(1)
        steering = with_dials(steering, low, high)
        note(_range(steering))
        return steering


def _chosen(
    engine: CalibrationEngine,
    recorder: Recorder,
    prompts: PromptSet,
    wishes: Wishes,
    name: str | None,
    progress: Progress,
    note: Callable[[str], object],
) -> Steering:
    material, axes = site_choice.Material.of(prompts), wishes.orthogonal_to or ()
    with progress("recording", passes(material.prompts, axes)) as step:
        steerings = site_choice.candidates(
            recorder, material.prompts, operator=wishes.operator, mask=wishes.mask,
            orthogonal_to=axes, step=step, note=note,
        )  # fmt: skip
    with progress("choosing sites", site_choice.measures(len(steerings))) as measured:
        steering, found = site_choice.choose(
            engine.open(list(steerings.values())), steerings, material, measured=measured
        )
    steering = steering.with_(name=prompts.name if name is None else name)
    for line in site_choice.table(found):
        note(line)
    note(_range(steering))
    return steering


def _range(steering: Steering) -> str:
    unit = "" if steering.operator == "addition" else "°"
    return (
        f"default {steering.angle:+g}{unit}, provisional range {steering.angle_min:+g}{unit} … "
        f"{steering.angle_max:+g}{unit}; `edge-steer sweep --write` measures the safe one"
    )
