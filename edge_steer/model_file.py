"""What a model's GGUF file says about itself: architecture, sizes, chat template, tensors. The weights stay unread."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_steer.errors import FormatError, quote
from edge_steer.gguf_metadata import Value, read_gguf
from edge_steer.gguf_tensors import TensorInfo
from edge_steer.provenance import CONTROL_CHARACTERS, MAX_NAME, BaseModel
from edge_steer.steering_file import holds_steerings

__all__ = ["ModelFile", "TensorInfo", "read_model"]

TOKENS = "tokenizer.ggml.tokens"
_VOCABULARY = {
    f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges", "precompiled_charsmap")
}
_SMALL = 4096
_MAX_BLOCKS = 1 << 14  # llama.cpp takes 512; every block is a few sites to make


@dataclass(frozen=True)
class ModelFile:
    """The head of a model's GGUF.

    metadata: scalars, strings and arrays of at most 4096 values (as lists), by key; the vocabulary is left out, and of
              an embedded steering all but its numbers.
    tensors:  in the file's order. tensors_start, data_start: bytes at which their descriptions and their data begin.
    tokenizer_sha256: of the length-prefixed tokens; None where the file has none.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    tensors_start: int
    data_start: int
    tokenizer_sha256: str | None

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def name(self) -> str:
        """What the model calls itself, else the file's name without its ending."""
        named = self.metadata.get("general.name")
        return named if isinstance(named, str) and named else self.path.stem

    @property
    def block_count(self) -> int:
        return self._size("block_count", _MAX_BLOCKS)

    @property
    def embedding_length(self) -> int:
        return self._size("embedding_length")

    @property
    def context_length(self) -> int:
        return self._size("context_length", (1 << 31) - 1)  # llama.cpp counts tokens in an int32

    @property
    def chat_template(self) -> str | None:
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def embeds_steerings(self) -> bool:
        """Whether steerings travel in its metadata."""
        return holds_steerings(self.metadata)

    @property
    def base(self) -> BaseModel:
        """The model as a steering names it. Raises FormatError if the file does not state its sizes."""
        name = re.sub(CONTROL_CHARACTERS, " ", self.name[:MAX_NAME]).strip()
        return BaseModel(self.architecture, name, self.block_count, self.embedding_length, self.tokenizer_sha256)

    def _size(self, what: str, most: int = (1 << 32) - 1) -> int:
        key = f"{self.architecture}.{what}"
        size = self.metadata.get(key)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= most:
            raise FormatError(f"{self.path}: expected {key} from 1 to {most}, got {quote(size)}; is this a model?")
        return size


def read_model(path: str | Path) -> ModelFile:
    """The head of the model file `path`.

    Raises FormatError if it is malformed, not a model, or one part of several, SteerError where it cannot be read.
    """
    path = Path(path)
    head = read_gguf(path, lambda key: key not in _VOCABULARY and not key.startswith("steering."), hashed=TOKENS)
    metadata = {key: _plain(value) for key, value in head.values.items() if _small(value)}
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if not isinstance(architecture, str) or not architecture:
        raise FormatError(f"{path}: expected a model, got a file without general.architecture; give a model's GGUF")
    if len(architecture) > MAX_NAME or re.search(CONTROL_CHARACTERS, architecture):
        raise FormatError(f"{path}: expected a name as general.architecture, got {quote(architecture)}")
    if architecture == "edge-steer":
        raise FormatError(f"{path}: expected a model, got a steering file; give it with -s and a model with -m")
    if kind != "model":
        raise FormatError(f"{path}: expected a model, got a file of general.type {quote(kind)}; give a model's GGUF")
    parts, part = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if isinstance(parts, int) and parts > 1:
        number = part + 1 if isinstance(part, int) else quote(part)
        raise FormatError(
            f"{path}: expected a model in one file, got part {number} of {parts}; "
            "join them with llama-gguf-split --merge"
        )
    return ModelFile(path, metadata, head.tensors, head.tensors_start, head.data_start, head.sha256)


def _small(value: Value) -> bool:
    return value.item is None or len(value.value) <= _SMALL


def _plain(value: Value) -> Any:
    return value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
