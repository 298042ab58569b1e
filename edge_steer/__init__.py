"""edge-steer: steer quantized language models on a laptop by turning their activations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edge_steer._version import __version__
from edge_steer.errors import FormatError, MismatchError, NoEffectError, SteerError

if TYPE_CHECKING:
    from edge_steer.api import calibrate
    from edge_steer.combining import combine
    from edge_steer.preset import load_preset
    from edge_steer.runtime.llama import SteeredLlama
    from edge_steer.sharing.find import find_steerings
    from edge_steer.steering import Steering

# The public names; what else a module here holds is for edge-steer's own use.
__all__ = [
    "FormatError", "MismatchError", "NoEffectError", "SteerError", "SteeredLlama", "Steering", "__version__",
    "calibrate", "combine", "find_steerings", "load_preset",
]  # fmt: skip


# numpy and llama-cpp-python take a good part of a second to import; `edge-steer --help` does without.
_LAZY = {
    "SteeredLlama": "edge_steer.runtime.llama",
    "Steering": "edge_steer.steering",
    "calibrate": "edge_steer.api",
    "combine": "edge_steer.combining",
    "find_steerings": "edge_steer.sharing.find",
    "load_preset": "edge_steer.preset",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
