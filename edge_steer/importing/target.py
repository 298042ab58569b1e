"""The model that an imported steering is for. What others publish does not say enough about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_steer.architectures import architecture
from edge_steer.errors import MismatchError
from edge_steer.export.hf_weights import read_checkpoint
from edge_steer.model_file import read_model
from edge_steer.provenance import BaseModel
from edge_steer.sites import Architecture


@dataclass(frozen=True)
class Target:
    """A model, as far as an import has to know it."""

    base: BaseModel
    architecture: Architecture

    def check(self, source: Path, what: str, wanted: object, found: object) -> None:
        """Raise MismatchError, with both values, where `source` is for another model."""
        if wanted != found:
            raise MismatchError(
                f"{source}: its {what} is {wanted}, that of {self.base.name} is {found}; give the model it was made for"
            )


def read_target(model: str | Path) -> Target:
    """The model in the GGUF file or Hugging Face directory `model`."""
    if Path(model).is_dir():
        checkpoint = read_checkpoint(model)
        return Target(checkpoint.base, checkpoint.architecture)
    file = read_model(model)
    return Target(file.base, architecture(file.architecture, [tensor.name for tensor in file.tensors]))
