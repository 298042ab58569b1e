"""A Hugging Face directory as it lies on disk: config.json and safetensors, whole or in shards, never read at once.

Letters: m rows, d columns of a weight.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import FormatError, SteerError, shown
from edge_steer.json_file import read_json

# numpy has no bfloat16: its bits are kept as uint16, which no checkpoint of the families here holds otherwise.
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_LONGEST_NAME = 200  # of a file
_CHUNK = 1 << 22  # elements turned to float32 at a time


@dataclass(frozen=True)
class Weight:
    """A tensor that still lies on disk. Several `parts`, all of one shape, are stacked along a new first axis.

    parts:  memory maps; uint16 holds bfloat16. offset: added to every element.
    """

    parts: tuple[NDArray[Any], ...]
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """In numpy's order, slowest axis first."""
        shape: tuple[int, ...] = self.parts[0].shape
        return (len(self.parts), *shape) if len(self.parts) > 1 else shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_bfloat16(self) -> bool:
        return all(part.dtype == np.uint16 for part in self.parts)

    def rearranged(self, order: Callable[[NDArray[Any]], NDArray[Any]]) -> Weight:
        """The weight with `order` applied to each part: a permutation or a reshape, nothing that computes."""
        return replace(self, parts=tuple(order(part) for part in self.parts))

    def rows(self) -> Iterator[NDArray[np.float32]]:
        """Its rows in order as blocks (k, d) float32 of a bounded size; a vector is one row."""
        for part in self.parts:
            flat = part.reshape(-1, part.shape[-1])
            step = max(1, _CHUNK // flat.shape[1])
            for start in range(0, len(flat), step):
                yield _float32(flat[start : start + step]) + np.float32(self.offset)


def _float32(block: NDArray[Any]) -> NDArray[np.float32]:
    if block.dtype == np.uint16:
        return (block.astype(np.uint32) << 16).view(np.float32)
    return block.astype(np.float32)


@dataclass(frozen=True)
class Config:
    """config.json of the language model; absent keys take the family's defaults, null means none."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises FormatError where there is none."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise FormatError(f"{self.path}: expected a positive whole number as {key}, got {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number. Raises FormatError where there is none."""
        return positive(self.path, key, self.get(key, default))

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; empty where there is none."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise FormatError(f"{self.path}: expected an object as {key}, got {shown(value)}")
        return value

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        return replace(self, values={**defaults, **self.values})

    @property
    def head_width(self) -> int:
        return self.integer("head_dim", self.integer("hidden_size") // self.integer("num_attention_heads"))


def positive(path: Path, key: str, value: Any) -> float:
    """`value` as a positive finite number. Raises FormatError where it is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise FormatError(f"{path}: expected a positive number as {key}, got {shown(value)}")
    return float(value)


def read_config(directory: Path) -> Config:
    """The language model's configuration; of a multimodal model, its text half under the whole's model_type."""
    path = directory / "config.json"
    values = read_json(path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise FormatError(f"{path}: expected the family's name as model_type, got {shown(model_type)}")
    text = values.get("text_config")
    if isinstance(text, dict):
        values = {**values, **text, "model_type": model_type}
    if values.get("quantization_config"):
        raise SteerError(
            f"{path}: expected plain weights, got quantized ones (quantization_config); "
            "load them with transformers, dequantize() and save_pretrained() first"
        )
    return Config(path, values)


def read_weights(directory: Path) -> dict[str, Weight]:
    """Every tensor of the directory by its Hugging Face name, in the files' order.

    Raises FormatError or SteerError where a shard is missing, truncated, or holds what the index does not say.
    """
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise SteerError(
                f"{directory}: expected model.safetensors or model.safetensors.index.json, found neither; "
                "save the model with save_pretrained(safe_serialization=True)"
            )
        return _shard(single)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise FormatError(f"{index}: expected a weight_map of tensor names to files; download the file again")
    found: dict[str, Weight] = {}
    for file in sorted(set(shards.values())):
        if Path(file).name != file or not file.isprintable() or len(file) > _LONGEST_NAME:
            raise FormatError(f"{index}: expected file names without folders, got {shown(file)}")
        if not (directory / file).is_file():
            raise SteerError(f"{index}: names {file}, which is not there; download it")
        found |= _shard(directory / file)
    missing = [name for name in shards if name not in found]
    if missing:
        raise FormatError(
            f"{index}: says that {shards[missing[0]]} holds {shown(missing[0])}, it does not; download both again"
        )
    return found


def _shard(path: Path) -> dict[str, Weight]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise SteerError("converting needs safetensors; pip install 'edge-steer[torch]'") from None
    try:
        # Checks the whole layout: names, types, sizes, no gap, no overlap, nothing past the end.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path}: expected a safetensors file, got {shown(str(error), 200)}; download it again"
        ) from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    size = os.path.getsize(path)
    data = np.memmap(path, np.uint8, "r", shape=(size,)) if size > 8 + length else np.empty(size, np.uint8)
    found = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + length + offset for offset in info["data_offsets"])
        if info["dtype"] not in _DTYPES:
            raise FormatError(
                f"{path}: expected {shown(name)} as {', '.join(_DTYPES)}, got {info['dtype']}; dequantize it first"
            )
        found[name] = Weight((data[start:stop].view(_DTYPES[info["dtype"]]).reshape(info["shape"]),))
    return found
