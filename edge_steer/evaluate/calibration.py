"""From a model and prompts to a steering that is ready for use: recorded, its sites chosen, its dial measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from edge_steer.calibrate import Mask, calibrate, passes
from edge_steer.calibrate.remembered import Remembered
from edge_steer.calibrate.sums import Recorder
from edge_steer.evaluate import choice
from edge_steer.evaluate.dial import Divergence, dial_at, has_range, with_dials
from edge_steer.evaluate.material import spread
from edge_steer.evaluate.metrics import probe_gaps
from edge_steer.evaluate.model import MeasuredModel, TorchModel
from edge_steer.export.progress import Progress, no_progress
from edge_steer.operators import Operator, Plane
from edge_steer.preset import load_preset
from edge_steer.prompts import PromptSet
from edge_steer.steering import Steering

# As long as any prompt or probe that is measured on; a recorded prompt may be longer.
_MEASURED_CONTEXT = 1024
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
            return choice.SITES
        if self.sites not in (None, "auto"):
            return str(self.sites)
        return {"shared": "layer_out"}.get(self.plane or "local", "pre")


class CalibrationEngine(Protocol):
    """Records prompts at sites of a model, and opens it with steerings to be measured."""

    def recorder(self, sites: str) -> Recorder: ...

    def uses_plain_template(self) -> bool: ...

    def unsteered(self) -> MeasuredModel:
        """The model that records."""

    def open(self, steerings: Sequence[Steering]) -> MeasuredModel:
        """The model with `steerings`, all off. What the recorder holds may be freed: it has recorded."""

    def close(self) -> None: ...


@dataclass
class NativeEngine:
    """A GGUF through llama.cpp. parameters: of SteeredLlama."""

    path: str
    parameters: dict[str, Any] = field(default_factory=dict)
    _opened: Any = None

    def recorder(self, sites: str) -> Recorder:
        from edge_steer.calibrate.native_recorder import NativeRecorder

        self._opened = NativeRecorder(self.path, sites=sites, **self.parameters)
        recorder: Recorder = self._opened
        return recorder

    def uses_plain_template(self) -> bool:
        return bool(self._opened.uses_plain_template)

    def unsteered(self) -> MeasuredModel:
        model: MeasuredModel = self._opened.model
        return model

    def open(self, steerings: Sequence[Steering]) -> MeasuredModel:
        from edge_steer.runtime.llama import SteeredLlama

        self.close()
        context = min(_MEASURED_CONTEXT, self.parameters.get("n_ctx", _MEASURED_CONTEXT))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*overlap")
            self._opened = SteeredLlama(
                self.path, steering=steerings, angles={each.name: None for each in steerings},
                **{**self.parameters, "n_ctx": context},
            )  # fmt: skip
        model: MeasuredModel = self._opened
        return model

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None


@dataclass
class TorchEngine:
    """A Hugging Face model through transformers. parameters: of TorchRecorder.load."""

    path: str
    parameters: dict[str, Any] = field(default_factory=dict)
    _recorder: Any = None

    def recorder(self, sites: str) -> Recorder:
        from edge_steer.calibrate.torch_recorder import TorchRecorder

        self._recorder = TorchRecorder.load(self.path, sites=sites, **self.parameters)
        recorder: Recorder = self._recorder
        return recorder

    def uses_plain_template(self) -> bool:
        return bool(self._recorder.uses_plain_template)

    def unsteered(self) -> MeasuredModel:
        return self.open(())

    def open(self, steerings: Sequence[Steering]) -> MeasuredModel:
        return TorchModel(self._recorder, steerings)

    def close(self) -> None:
        self._recorder = None


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
    material, axes = choice.Material.of(prompts), wishes.orthogonal_to or ()
    with progress("recording", passes(material.prompts, axes)) as step:
        steerings = choice.candidates(
            recorder, material.prompts, operator=wishes.operator, mask=wishes.mask,
            orthogonal_to=axes, step=step, note=note,
        )  # fmt: skip
    with progress("choosing sites", choice.measures(len(steerings))) as measured:
        steering, found = choice.choose(engine.open(list(steerings.values())), steerings, material, measured=measured)
    steering = steering.with_(name=prompts.name if name is None else name)
    for line in choice.table(found):
        note(line)
    note(_range(steering))
    return steering


def _range(steering: Steering) -> str:
    unit = "" if steering.operator == "addition" else "°"
    return (
        f"default {steering.angle:+g}{unit}, provisional range {steering.angle_min:+g}{unit} … "
        f"{steering.angle_max:+g}{unit}; `edge-steer sweep --write` measures the safe one"
    )
