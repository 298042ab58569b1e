"""A Hugging Face directory's weights under their GGUF names, and steerings folded into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_steer.architectures import architecture_of
from edge_steer.checkpoint import Config, read_config, read_tensors
from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.export.folding import Folding, Reads, folding
from edge_steer.export.readers import check_experts, gguf_name
from edge_steer.provenance import BaseModel
from edge_steer.safetensors_file import Tensor, to_float32
from edge_steer.sites import Architecture
from edge_steer.steering import Steering


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory. tensors: those of all shards, by name. names: GGUF name of each that has one."""

    folder: Path
    config: Config
    architecture: Architecture
    base: BaseModel
    tensors: dict[str, Tensor]
    names: dict[str, str]

    def values(self, name: str) -> NDArray[np.float64]:
        """A norm's weight as it multiplies, or a vector as it is added, by its GGUF name: (d,)."""
        tensor = self.tensors[next(tensor for tensor, known in self.names.items() if known == name)]
        stored = to_float32(tensor.memory()).astype(np.float64)
        return stored + self.norm_offset if name.endswith("norm.weight") else stored

    @property
    def norm_offset(self) -> float:
        """What is added to a norm's weight as it is stored."""
        return 1.0 if self.architecture.norm_plus_one else 0.0

    def fold(self, steerings: Sequence[Steering]) -> Folding:
        """The folding of `steerings`, which must fit, into these weights."""
        for steering in steerings:
            steering.check_fits(self.base)
        folded = folding(steerings, self.architecture, set(self.names.values()), self.values)
        experts: dict[str, int] = {}
        width = self.base.embedding_length
        for tensor, name in self.names.items():
            if name not in folded.parts:
                continue
            shape, part = self.tensors[tensor].shape, folded.parts[name]
            if shape[-1 if len(shape) == 1 or isinstance(part, Reads) else -2 :][:1] != (width,):
                raise SteerError(f"expected {quote(tensor)} with {'rows' if len(shape) > 1 else 'a width'} of {width}, "
                                 f"got shape {shape}")  # fmt: skip
            self.tensors[tensor].memory()  # refuses a type that cannot be turned
            if name.endswith("_exps.weight"):
                experts[name] = experts.get(name, 0) + (shape[0] if len(shape) == 3 else 1)
        count = self.config.get("num_local_experts") or self.config.get("num_experts") or 0
        if not isinstance(count, int):
            raise FormatError(f"{self.config.path}: expected a number of experts, got {quote(count)}")
        check_experts(list(experts.items()), count)
        return folded


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """What the Hugging Face directory `folder` holds; no weights are read.

    Raises FormatError if it is malformed, SteerError where it is none or of an unknown model.
    """
    folder = Path(folder)
    config = read_config(folder)
    architecture_of(config.values, where=config.path)  # refuses an unknown model before its shards are looked at
    tensors = read_tensors(folder)
    arch = architecture_of(config.values, tensors, where=config.path)
    names = {tensor: name for tensor in tensors if (name := gguf_name(arch, tensor)) is not None}
    layers, width = config.integer("num_hidden_layers"), config.integer("hidden_size")
    base = BaseModel(arch.name, folder.resolve().name, layers, width)
    return Checkpoint(folder, config, arch, base, tensors, names)
