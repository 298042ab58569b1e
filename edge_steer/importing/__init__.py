"""Steerings that others have made, as steering files: the published calibrations of the method, and control vectors."""

from __future__ import annotations

from pathlib import Path

from edge_steer.errors import SteerError
from edge_steer.importing.control_vector import import_control_vector
from edge_steer.importing.published import import_published
from edge_steer.importing.target import Target, read_target
from edge_steer.steering import Steering

__all__ = ["Target", "import_control_vector", "import_published", "import_steering", "read_target"]


def import_steering(source: str | Path, model: str | Path, *, name: str | None = None) -> Steering:
    """The steering in `source`, for `model`: a GGUF file or a Hugging Face directory.

    source: a published calibration (its folder, or its plane.pt), or a control vector in GGUF. name: of the steering,
    else that of the source. Raises SteerError if the source is neither, is malformed, or is for another model.
    """
    source = Path(source)
    if source.is_dir():
        source /= "plane.pt"
    try:
        with source.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SteerError(f"cannot read {source}: {error.strerror or error}; check the path") from None
    if magic == b"GGUF":
        return import_control_vector(source, read_target(model), name or source.stem)
    return import_published(source, read_target(model), name or source.resolve().parent.name)
