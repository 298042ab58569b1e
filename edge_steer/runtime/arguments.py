"""The arguments of SteeredLlama that go to llama_cpp.Llama, looked at first: it passes over a name that it does not
know, takes a context of any length, and goes down with an adapter that is none."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

from llama_cpp import Llama

from edge_steer.errors import SteerError, quote
from edge_steer.model_file import ModelFile

_KNOWN = frozenset(inspect.signature(Llama.__init__).parameters) - {"self", "model_path", "kwargs"}
NO_EMBEDDINGS = "SteeredLlama does not compute embeddings; use llama_cpp.Llama for them"
# A vocabulary of this kind loads, and every question about one of its tokens then ends the process.
_NO_VOCABULARY = ("none", "no_vocab")


def check_arguments(file: ModelFile, given: dict[str, Any]) -> None:
    """Raise SteerError where llama.cpp cannot be given the model, or Llama one of the arguments."""
    if given.get("embedding"):
        raise SteerError(NO_EMBEDDINGS)
    for name in given:
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, [*_KNOWN, "steering", "angle", "angles", "scope", "engine"], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SteerError(f"expected an argument of SteeredLlama or llama_cpp.Llama, got {name!r}{hint}")
    try:
        str(file.path).encode()
    except UnicodeEncodeError:
        raise SteerError(f"expected a model path in UTF-8, got {quote(str(file.path))}; rename the file") from None
    if file.metadata.get("tokenizer.ggml.model") in _NO_VOCABULARY:
        raise SteerError(f"{file.path}: expected a model with a vocabulary, got one without; convert it again")


def context_length(file: ModelFile, asked: int | None) -> int:
    """Tokens of the context: those that are asked for, or, for 0 and None, that the model was trained for.

    llama.cpp rounds them up to a multiple of 256; llama-cpp-python's own arrays must be as long.
    """
    if asked is not None and asked < 0:
        raise SteerError(f"expected n_ctx of 0, for the model's, or more, got {asked}")
    return -(-(asked or file.context_length) // 256) * 256


def adapter_path(path: str | Path | None) -> str | None:
    """The path of an adapter that is to be loaded. Raises SteerError if there is no such file."""
    if path is not None and not Path(path).is_file():
        raise SteerError(f"expected an adapter at {path}, got no file; check lora_path")
    return None if path is None else str(path)
