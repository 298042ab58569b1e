"""Hugging Face checkpoints: where safetensors keep each tensor, and their number types in numpy."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import FormatError, SteerError
from edge_steer.export.readers import check_experts, gguf_name, steered_readers
from edge_steer.sites import MODEL_TYPES, Architecture, Site, architecture
from edge_steer.steering import BaseModel, Steering

_LENGTH = struct.Struct("<Q")
_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a shard: its name, type (as in safetensors), shape, and first byte in the file."""

    name: str
    shard: Path
    type: str
    shape: tuple[int, ...]
    start: int

    def memory(self, path: Path, mode: Any = "r") -> NDArray[Any]:
        """Its values in the shard's copy at `path`, mapped. Raises SteerError for a type that is no plain float."""
        if self.type not in _TYPES:
            known = ", ".join(_TYPES)
            raise SteerError(
                f"expected {self.name} as one of {known}, got {self.type}; give a checkpoint not quantized"
            )
        return np.memmap(path, _TYPES[self.type], mode, self.start, self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory. tensors: those of all shards, by name. names: GGUF name of each that is in a block."""

    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    base: BaseModel
    tensors: dict[str, HfTensor]
    names: dict[str, str]

    def readers(self, steerings: list[Steering]) -> dict[str, Site]:
        """The tensors that read a site which one of `steerings` turns, which must fit, and that site."""
        for steering in steerings:
            steering.check_fits(self.base)
        sites = steered_readers(steerings, self.architecture, set(self.names.values()))
        found = {tensor: sites[name] for tensor, name in self.names.items() if name in sites}
        experts: dict[str, int] = {}
        for tensor in found:
            shape, name = self.tensors[tensor].shape, self.names[tensor]
            if shape[-1] != self.base.embedding_length:
                raise SteerError(f"expected {tensor} with rows of {self.base.embedding_length}, got shape {shape}")
            self.tensors[tensor].memory(self.tensors[tensor].shard)  # refuses a type that cannot be turned
            if name.endswith("_exps.weight"):
                experts[name] = experts.get(name, 0) + (shape[0] if len(shape) == 3 else 1)
        config = self.config.get("text_config", self.config)
        count = config.get("num_local_experts") or config.get("num_experts") or 0
        check_experts(list(experts.items()), count)
        return found


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """What the Hugging Face directory `folder` holds; no weights are read.

    Raises FormatError where it is malformed, SteerError where it is none or of an unknown model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise SteerError(f"expected a Hugging Face directory with config.json, got {folder}; give a GGUF to --to gguf")
    config = _json(folder / "config.json")
    text = config.get("text_config", config)
    model_type = next(
        (each for each in (config.get("model_type"), text.get("model_type")) if each in MODEL_TYPES), None
    )
    if model_type is None:
        known = ", ".join(sorted(MODEL_TYPES))
        raise SteerError(
            f"expected a model_type among {known}, got {config.get('model_type')!r} in {folder}/config.json"
        )
    if "quantization_config" in config:
        raise SteerError(f"{folder} holds quantized weights; give the checkpoint it was made from, or a GGUF")
    tensors = {tensor.name: tensor for shard in _shards(folder) for tensor in _tensors(shard)}
    arch = architecture(MODEL_TYPES[model_type])
    names = {tensor: name for tensor in tensors if (name := gguf_name(arch, tensor)) is not None}
    arch = architecture(MODEL_TYPES[model_type], set(names.values()))
    try:
        base = BaseModel(arch.name, folder.resolve().name, int(text["num_hidden_layers"]), int(text["hidden_size"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{folder}/config.json: expected num_hidden_layers and hidden_size, got {error}") from None
    return Checkpoint(folder, config, arch, base, tensors, names)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(_json(index).get("weight_map", {}).values()))
        shards = [folder / name for name in named if Path(name).name == name]
    else:
        shards = [folder / "model.safetensors"]
    for shard in shards:
        if not shard.is_file():
            raise SteerError(f"expected weights in {shard}, found no such file; save the model as safetensors")
    return shards


def _tensors(shard: Path) -> list[HfTensor]:
    size = shard.stat().st_size
    with shard.open("rb") as file:
        raw = file.read(_LENGTH.size)
        length = _LENGTH.unpack(raw)[0] if len(raw) == _LENGTH.size else size
        if length > size - _LENGTH.size:
            raise FormatError(f"{shard}: expected a header within the file's {size} bytes; the file is cut short")
        header = file.read(length)
    begin = _LENGTH.size + length
    found = []
    try:
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            shape, (first, last) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
            tensor = HfTensor(name, shard, str(entry["dtype"]), shape, begin + first)
            itemsize = np.dtype(_TYPES.get(tensor.type, "u1")).itemsize
            if not 0 <= first <= last <= size - begin or min(shape, default=0) < 0:
                raise FormatError(f"{shard}: expected {name} within the file's {size} bytes; fetch it again")
            if tensor.type in _TYPES and math.prod(shape) * itemsize != last - first:
                raise FormatError(f"{shard}: expected {name} {shape} in {last - first} bytes; fetch it again")
            found.append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{shard}: expected a safetensors header, got {error!r}") from None
    return found


def to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Values as they stand in a shard as float32; bfloat16 comes as its 16 bits."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def from_float32(values: NDArray[np.float32], like: np.dtype[Any]) -> NDArray[Any]:
    """float32 as the type of a shard's values, rounded to nearest even."""
    if like == np.uint16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(like)


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write float32 tensors to a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in tensors.items():
        end = offset + values.size * 4
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, "<f4").tobytes())
