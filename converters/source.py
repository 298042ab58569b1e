"""A Hugging Face directory read as a model that llama.cpp has a form for; nothing but headers is read yet."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_steer.checkpoint import read_config
from edge_steer.converters.family import OTHER_WAY, Family, Keys, common_keys, note_window, rope
from edge_steer.converters.gemma2 import GEMMA2
from edge_steer.converters.gemma3 import GEMMA3
from edge_steer.converters.llama import LLAMA, MISTRAL, MIXTRAL
from edge_steer.converters.phi3 import PHI3
from edge_steer.converters.qwen2 import QWEN2, QWEN2_MOE
from edge_steer.converters.qwen3 import QWEN3
from edge_steer.converters.tensors import read_gguf_weights
from edge_steer.converters.vocabulary import Vocabulary, read_vocabulary
from edge_steer.converters.weights import Weight
from edge_steer.errors import SteerError, quote
from edge_steer.provenance import BaseModel

# By config.json's model_type.
FAMILIES: dict[str, Family] = {
    "llama": LLAMA, "mistral": MISTRAL, "mixtral": MIXTRAL, "qwen2": QWEN2, "qwen2_moe": QWEN2_MOE, "qwen3": QWEN3,
    "gemma2": GEMMA2, "gemma3": GEMMA3, "gemma3_text": GEMMA3, "phi3": PHI3,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model read from a Hugging Face directory, its weights still there.

    weights: by GGUF name, in the order they are written. keys: of GGUF, in full.
    """

    family: Family
    name: str
    keys: Keys
    vocabulary: Vocabulary
    weights: Mapping[str, Weight]

    @property
    def base(self) -> BaseModel:
        """The model as a steering names it."""
        layers, width = (self.keys[f"{self.family.arch}.{key}"] for key in ("block_count", "embedding_length"))
        return BaseModel(self.family.arch, self.name, layers, width, self.vocabulary.sha256)

    @property
    def type(self) -> str:
        """The type to write where none is asked for: the source's own if it is BF16, else F16."""
        matrices = [weight for weight in self.weights.values() if len(weight.shape) > 1]
        return "bf16" if all(weight.is_bfloat16 for weight in matrices) else "f16"


def read(directory: str | Path, *, pre: str | None = None) -> Source:
    """The model in `directory`; `pre` names the pre-tokenizer where it is not recognised.

    Warns of what llama.cpp computes otherwise. Raises SteerError if the directory is broken, the family not one of
    FAMILIES, or llama.cpp has no form of what the configuration asks for.
    """
    directory = Path(directory)
    config = read_config(directory)
    family = FAMILIES.get(config.values["model_type"])
    if family is None:
        known = ", ".join(FAMILIES)
        raise SteerError(
            f"{config.path}: expected model_type {known}, got {quote(config.values['model_type'])}; {OTHER_WAY}"
        )
    config = config.with_defaults(family.defaults)
    activation = config.get("hidden_activation", config.get("hidden_act", family.activation))
    if activation != family.activation:
        raise SteerError(
            f"{config.path}: expected activation {family.activation}, got {quote(activation)}; {OTHER_WAY}"
        )
    family.check(config)
    if family.arch not in ("gemma2", "gemma3") and (note := note_window(config)):
        warnings.warn(note, stacklevel=2)
    weights = read_gguf_weights(directory, config, family)
    size, _ = weights["token_embd.weight"].shape
    vocabulary = read_vocabulary(directory, size, pre)
    turned, computed = rope(config)
    keys = {**common_keys(config), "vocab_size": size, **turned, **family.keys(config)}
    for tensor, factors in computed.items():
        weights[tensor] = Weight((factors,))
    name = _name(directory, vocabulary)
    return Source(family, name, {f"{family.arch}.{key}": value for key, value in keys.items()}, vocabulary, weights)


def _name(directory: Path, vocabulary: Vocabulary) -> str:
    """What the directory is called, in the hub's cache the model; empty where llama.cpp would take the name for a
    promise about the vocabulary."""
    whole = directory.resolve()
    name = whole.parent.parent.name.split("--")[-1] if re.fullmatch(r"[0-9a-f]{40}", whole.name) else whole.name
    promises = "phi3" in name.lower() or "phi-3" in name.lower()
    return "" if promises and not {"<s>", "</s>", "<unk>", "<|endoftext|>"} <= set(vocabulary.tokens) else name
