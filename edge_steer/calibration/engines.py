"""What calibration runs a model on: llama.cpp for a GGUF, transformers for a Hugging Face directory or hub id."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edge_steer.calibration.sums import Recorder
from edge_steer.measure.measured_model import MeasuredModel, TorchModel
from edge_steer.registry import is_gguf
from edge_steer.steering import Steering

# As long as any prompt or probe that is measured on; a recorded prompt may be longer.
_MEASURED_CONTEXT = 1024


def is_hugging_face(model: str) -> bool:
    """Whether a model's name or path means a Hugging Face directory or hub id, and not a GGUF."""
    return Path(model).is_dir() or ("/" in model and not is_gguf(model))


class CalibrationEngine(Protocol):
    """Records prompts at sites of a model, and opens it with steerings to be measured."""

    def open_recorder(self, sites: str) -> Recorder: ...

    def uses_plain_template(self) -> bool: ...

    def unsteered_model(self) -> MeasuredModel:
        """The model that records."""

    def open_steered(self, steerings: Sequence[Steering]) -> MeasuredModel:
        """The model with `steerings`, all off. What the recorder holds may be freed: it has recorded."""

    def close(self) -> None: ...


@dataclass
class NativeEngine:
    """A GGUF through llama.cpp. parameters: of SteeredLlama."""

    path: str
    parameters: dict[str, Any] = field(default_factory=dict)
    _opened: Any = None

    def open_recorder(self, sites: str) -> Recorder:
        from edge_steer.calibration.native_recorder import NativeRecorder

        self._opened = NativeRecorder(self.path, sites=sites, **self.parameters)
        recorder: Recorder = self._opened
        return recorder

    def uses_plain_template(self) -> bool:
        return bool(self._opened.uses_plain_template)

    def unsteered_model(self) -> MeasuredModel:
        model: MeasuredModel = self._opened.model
        return model

    def open_steered(self, steerings: Sequence[Steering]) -> MeasuredModel:
        from edge_steer.runtime.llama import SteeredLlama
        from edge_steer.runtime.together import SEQUENCES

        self.close()
        context = min(_MEASURED_CONTEXT, self.parameters.get("n_ctx", _MEASURED_CONTEXT))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*overlap")
            self._opened = SteeredLlama(
                self.path, steering=steerings, angles={each.name: None for each in steerings},
                sequences=SEQUENCES, **{**self.parameters, "n_ctx": context},
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

    def open_recorder(self, sites: str) -> Recorder:
        from edge_steer.calibration.torch_recorder import TorchRecorder

        self._recorder = TorchRecorder.load(self.path, sites=sites, **self.parameters)
        recorder: Recorder = self._recorder
        return recorder

    def uses_plain_template(self) -> bool:
        return bool(self._recorder.uses_plain_template)

    def unsteered_model(self) -> MeasuredModel:
        return self.open_steered(())

    def open_steered(self, steerings: Sequence[Steering]) -> MeasuredModel:
        return TorchModel(self._recorder, steerings)

    def close(self) -> None:
        self._recorder = None
