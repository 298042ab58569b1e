"""edge-steer: steer quantized language models on a laptop by turning their activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_steer._version import __version__
from edge_steer.errors import FormatError, MismatchError, NoEffectError, SteerError
from edge_steer.steering import Steering

if TYPE_CHECKING:
    from edge_steer.runtime.llama import SteeredLlama

__all__ = ["FormatError", "MismatchError", "NoEffectError", "SteerError", "SteeredLlama", "Steering", "__version__"]


def __getattr__(name: str) -> Any:
    # llama-cpp-python takes a good part of a second to import; a program that only reads files does without.
    if name == "SteeredLlama":
        from edge_steer.runtime.llama import SteeredLlama

        return SteeredLlama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
