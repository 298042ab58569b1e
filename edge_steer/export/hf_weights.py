"""Hugging Face checkpoints: where safetensors keep each tensor, and their number types in numpy."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import FormatError, SteerError, shown
from edge_steer.export.folding import Folding, Reads, folding
from edge_steer.export.readers import check_experts, gguf_name
from edge_steer.json_file import read_json
from edge_steer.sites import MODEL_TYPES, Architecture, architecture
from edge_steer.steering import BaseModel, Steering

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000  # safetensors' own limit
_BLOCK = 1 << 22  # values in a block of rows
_LONGEST_NAME = 200  # of a file
_MOST_AXES = 8  # their product is a number of any length
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
            known, found = ", ".join(_TYPES), shown(self.type)
            raise SteerError(
                f"expected {shown(self.name)} as one of {known}, got {found}; give a checkpoint that is not quantized"
            )
        return np.memmap(path, _TYPES[self.type], mode, self.start, self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory. tensors: those of all shards, by name. names: GGUF name of each that has one."""

    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    base: BaseModel
    tensors: dict[str, HfTensor]
    names: dict[str, str]

    def values(self, name: str) -> NDArray[np.float64]:
        """A norm's weight as it multiplies, or a vector as it is added, by its GGUF name: (d,)."""
        tensor = self.tensors[next(tensor for tensor, known in self.names.items() if known == name)]
        stored = to_float32(tensor.memory(tensor.shard)).astype(np.float64)
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
                raise SteerError(f"expected {shown(tensor)} with {'rows' if len(shape) > 1 else 'a width'} of {width}, "
                                 f"got shape {shape}")  # fmt: skip
            self.tensors[tensor].memory(self.tensors[tensor].shard)  # refuses a type that cannot be turned
            if name.endswith("_exps.weight"):
                experts[name] = experts.get(name, 0) + (shape[0] if len(shape) == 3 else 1)
        config = _text_config(self.folder, self.config)
        count = config.get("num_local_experts") or config.get("num_experts") or 0
        if not isinstance(count, int):
            raise FormatError(f"{self.folder}/config.json: expected a number of experts, got {shown(count)}")
        check_experts(list(experts.items()), count)
        return folded


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """What the Hugging Face directory `folder` holds; no weights are read.

    Raises FormatError where it is malformed, SteerError where it is none or of an unknown model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise SteerError(f"expected a Hugging Face directory with config.json, got {folder}; give a GGUF to --to gguf")
    config = read_json(folder / "config.json")
    text = _text_config(folder, config)
    named = [each for each in (config.get("model_type"), text.get("model_type")) if isinstance(each, str)]
    model_type = next((each for each in named if each in MODEL_TYPES), None)
    if model_type is None:
        known = ", ".join(sorted(MODEL_TYPES))
        raise SteerError(
            f"expected a model_type among {known}, got {shown(config.get('model_type'))} in {folder}/config.json"
        )
    if "quantization_config" in config:
        raise SteerError(f"{folder} holds quantized weights; give the checkpoint it was made from, or a GGUF")
    shards = _shards(folder)
    tensors = {tensor.name: tensor for shard in sorted(set(shards.values())) for tensor in _tensors(shard)}
    if missing := [name for name in shards if name and name not in tensors]:
        raise FormatError(f"expected {shown(missing[0])} in {shards[missing[0]]}, found none; fetch it again")
    arch = architecture(MODEL_TYPES[model_type])
    names = {tensor: name for tensor in tensors if (name := gguf_name(arch, tensor)) is not None}
    arch = architecture(MODEL_TYPES[model_type], set(names.values()))
    names = {tensor: name for tensor in tensors if (name := gguf_name(arch, tensor)) is not None}
    layers, width = (_size(folder, text, key) for key in ("num_hidden_layers", "hidden_size"))
    base = BaseModel(arch.name, folder.resolve().name, layers, width)
    return Checkpoint(folder, config, arch, base, tensors, names)


def _text_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration, which is all of it where the model is nothing else."""
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise FormatError(f"{folder}/config.json: expected an object as text_config, got {shown(text)}")
    return text


def _size(folder: Path, text: dict[str, Any], key: str) -> int:
    size = text.get(key)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 1 << 32:
        raise FormatError(f"{folder}/config.json: expected a positive whole number as {key}, got {shown(size)}")
    return size


def _shards(folder: Path) -> dict[str, Path]:
    """The file of every tensor that the index names; of all, under no name, where there is no index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise FormatError(f"{index}: expected a weight_map of tensor names to files; fetch it again")
        for name in named.values():
            if Path(name).name != name or not name.isprintable() or len(name) > _LONGEST_NAME:
                raise FormatError(f"{index}: expected file names without folders, got {shown(name)}")
        shards = {tensor: folder / name for tensor, name in named.items()}
    else:
        shards = {"": folder / "model.safetensors"}
    for shard in set(shards.values()):
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
        if length > _LARGEST_HEADER:
            raise FormatError(f"{shard}: expected a header of at most {_LARGEST_HEADER} bytes, got {length}")
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
            if len(shape) > _MOST_AXES or min(shape, default=0) < 0:
                raise FormatError(f"{shard}: expected {shown(name)} of at most {_MOST_AXES} axes, got {shown(shape)}")
            if not 0 <= first <= last <= size - begin:
                raise FormatError(f"{shard}: expected {shown(name)} within the file's {size} bytes; fetch it again")
            if tensor.type in _TYPES and math.prod(shape) * itemsize != last - first:
                held = f"{last - first} bytes"
                raise FormatError(f"{shard}: expected {shown(name)} {shown(shape)} in {held}; fetch it again")
            found.append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{shard}: expected a safetensors header, got {shown(error)}; fetch it again") from None
    return found


def blocks_of(tensor: HfTensor) -> Iterator[NDArray[np.float32]]:
    """A tensor's rows (n, width) in order, some at a time, as float32; a vector is one row."""
    weight = tensor.memory(tensor.shard)
    rows = weight.reshape(-1, weight.shape[-1])
    at_once = max(1, _BLOCK // rows.shape[1])
    for first in range(0, len(rows), at_once):
        yield to_float32(rows[first : first + at_once])


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


def new_safetensors(path: Path, name: str, like: HfTensor) -> NDArray[Any]:
    """A new file with one tensor of the type and shape of another, mapped for writing."""
    size = math.prod(like.shape) * np.dtype(_TYPES[like.type]).itemsize
    entry = {"dtype": like.type, "shape": list(like.shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"format": "pt"}, name: entry}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        file.truncate(_LENGTH.size + len(text) + size)
    return np.memmap(path, _TYPES[like.type], "r+", _LENGTH.size + len(text), like.shape)


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
