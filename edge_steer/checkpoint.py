"""A Hugging Face directory as it lies on disk: its config.json, and its tensors in one safetensors file or in shards.

Nothing outside the directory is opened, and no weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.json_file import read_json
from edge_steer.safetensors_file import Tensor, read_safetensors

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_LONGEST_NAME = 200  # of a file


@dataclass(frozen=True)
class Config:
    """config.json of the language model; absent keys take the family's defaults, null means none."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises FormatError if there is none."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise FormatError(f"{self.path}: expected a positive whole number as {key}, got {quote(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number. Raises FormatError if there is none."""
        return positive(self.path, key, self.get(key, default))

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; empty where there is none."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise FormatError(f"{self.path}: expected an object as {key}, got {quote(value)}")
        return value

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        return replace(self, values={**defaults, **self.values})

    @property
    def head_width(self) -> int:
        return self.integer("head_dim", self.integer("hidden_size") // self.integer("num_attention_heads"))


def positive(path: Path, key: str, value: Any) -> float:
    """`value` as a positive finite number. Raises FormatError if it is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise FormatError(f"{path}: expected a positive number as {key}, got {quote(value)}")
    return float(value)


def read_config(folder: Path) -> Config:
    """The language model's configuration; of a multimodal model, its text half under the whole's model_type.

    Raises FormatError if it is malformed, SteerError where there is none or the weights are quantized.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise SteerError(
            f"expected a Hugging Face directory with {CONFIG}, got {folder}; give one as save_pretrained writes it"
        )
    whole = Config(path, read_json(path))
    model_type = whole.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise FormatError(f"{path}: expected the family's name as model_type, got {quote(model_type)}")
    config = replace(whole, values={**whole.values, **whole.mapping("text_config"), "model_type": model_type})
    if any(each.get("quantization_config") is not None for each in (whole, config)):
        raise SteerError(
            f"{path}: expected plain weights, got quantized ones (quantization_config); "
            "load them with transformers, dequantize() and save_pretrained() first"
        )
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the directory by its Hugging Face name, in the files' order.

    Raises FormatError or SteerError where a shard is missing, truncated, or lacks what the index says that it holds.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WHOLE).is_file():
            raise SteerError(
                f"{folder}: expected {WHOLE} or {INDEX}, found neither; "
                "save the model with save_pretrained(safe_serialization=True)"
            )
        return {tensor.name: tensor for tensor in read_safetensors(folder / WHOLE)}
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise FormatError(f"{index}: expected a weight_map of tensor names to files; fetch it again")
    files = sorted(set(shards.values()))
    for file in files:
        if Path(file).name != file or not file.isprintable() or len(file) > _LONGEST_NAME:
            raise FormatError(f"{index}: expected file names without folders, got {quote(file)}")
        if not (folder / file).is_file():
            raise SteerError(f"{index}: names {file}, which is not there; fetch it")
    found = {tensor.name: tensor for file in files for tensor in read_safetensors(folder / file)}
    for name, file in shards.items():
        if name not in found:
            raise FormatError(f"{index}: says that {file} holds {quote(name)}, it does not; fetch both again")
    return found
