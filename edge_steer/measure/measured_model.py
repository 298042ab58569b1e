"""What is asked of a model that is measured: logits under its dials. SteeredLlama is one, TorchModel the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_steer.runtime.dials import Dials
from edge_steer.steering import Steering

if TYPE_CHECKING:
    from edge_steer.calibration.torch_recorder import TorchRecorder
    from edge_steer.chat_template import ChatTemplate

T = TypeVar("T")


class MeasuredModel(Protocol):
    """A model with steerings whose dials can be set."""

    @property
    def angles(self) -> Dials: ...

    @property
    def chat_template(self) -> ChatTemplate: ...

    def n_ctx(self) -> int: ...

    def text_tokens(self, text: str) -> list[int]: ...

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]: ...

    def logits(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """Logits (len(tokens) − start, vocabulary) in place of tokens[start:], under the dials."""

    def map_logits(
        self, texts: Sequence[tuple[Sequence[int], int]], of: Callable[[int, NDArray[np.float32]], T]
    ) -> list[T]:
        """`of` each text's number and its logits; a text is its tokens and start."""


class TorchModel:
    """A transformers model that a TorchRecorder has loaded, steered by forward hooks: slow and exact."""

    def __init__(self, recorder: TorchRecorder, steerings: Sequence[Steering]) -> None:
        self.angles = Dials(steerings)
        self.chat_template = recorder.template
        self._recorder, self._steerings = recorder, tuple(steerings)

    def n_ctx(self) -> int:
        return int(getattr(self._recorder.model.config.get_text_config(), "max_position_embeddings", 4096))

    def text_tokens(self, text: str) -> list[int]:
        return self._recorder.text_tokens(text)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return self._recorder.text_tokens(text.decode())

    def logits(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        import torch

        from edge_steer.runtime.torch_hooks import steer

        model = self._recorder.model
        ids = torch.tensor([list(tokens)], device=model.device)
        dialled = [(each, self.angles[each.name]) for each in self._steerings]
        with torch.inference_mode(), steer(model, dialled):
            rows: Any = model(ids, use_cache=False).logits[0, start - 1 : -1]
        return np.asarray(rows.float().cpu().numpy())

    def map_logits(
        self, texts: Sequence[tuple[Sequence[int], int]], of: Callable[[int, NDArray[np.float32]], T]
    ) -> list[T]:
        return [of(number, self.logits(*each)) for number, each in enumerate(texts)]


def set_dial(model: MeasuredModel, name: str | None, dial: float | None) -> None:
    """Turn the steering `name` to `dial` and all others off; None: all off."""
    model.angles.update(dict.fromkeys(model.angles))
    if name is not None:
        model.angles[name] = dial
