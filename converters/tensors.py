"""A checkpoint's tensors as a GGUF has them: by their names there, in their forms there, of the shapes that the
configuration says, none missing and none too many."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from edge_steer.checkpoint import Config
from edge_steer.converters.family import OTHER_WAY, Family, Shapes
from edge_steer.converters.weights import Weight, read_weights
from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.export.folding import EMBEDDING, HEAD

# Left behind by older files, computed anew by every engine; and the half of a multimodal model that reads images.
_UNUSED = re.compile(r".*rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*")
_EXPERT = re.compile(r"(.*\.experts)\.([0-9]{1,6})\.(.*)")


def read_gguf_weights(directory: Path, config: Config, family: Family) -> dict[str, Weight]:
    """Every weight by its GGUF name and in its GGUF form. Raises FormatError if one is missing, too many or of
    another shape than the configuration says."""
    found = _read_named(directory, config, family)
    tied = bool(config.get("tie_word_embeddings")) and _same(found.get(HEAD), found.get(EMBEDDING))
    if tied:
        found.pop(HEAD, None)
    expected, allowed = _shapes(config, family, found, tied=tied)
    _demand_shapes(directory, found, expected, allowed)
    if family.tied_only and HEAD in found:
        raise SteerError(f"{directory}: llama.cpp's {family.arch} has no output weight of its own; {OTHER_WAY}")
    return {name: found[name] for name in (*expected, *allowed) if name in found}


def _read_named(directory: Path, config: Config, family: Family) -> dict[str, Weight]:
    """What the directory holds by GGUF names, in its GGUF form."""
    layers = config.integer("num_hidden_layers")
    weights = _stack_experts(directory, read_weights(directory))
    if layers > len(weights):
        raise FormatError(f"{config.path}: expected at most {len(weights)} layers for as many weights, got {layers}")
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    names = get_tensor_name_map(MODEL_ARCH(arch), layers)
    found: dict[str, Weight] = {}
    for tensor, weight in weights.items():
        if _UNUSED.fullmatch(tensor):
            continue
        stem, _, kind = tensor.replace("language_model.", "").rpartition(".")
        name = names.get_name(stem if stem.startswith(("model.", "lm_head")) else f"model.{stem}")
        if name is None or kind not in ("weight", "bias"):
            raise SteerError(f"{directory}: {quote(tensor)} has no place in llama.cpp's {family.arch}; {OTHER_WAY}")
        found[f"{name}.{kind}"] = family.form(config, f"{name}.{kind}", weight)
    return found


def _shapes(config: Config, family: Family, found: Mapping[str, Weight], *, tied: bool) -> tuple[Shapes, Shapes]:
    """The shapes of the weights that a model so configured has, and of those that it may have."""
    width = config.integer("hidden_size")
    embedding = found[EMBEDDING].shape if EMBEDDING in found else ()
    size = config.integer("vocab_size", embedding[0] if embedding else 1)
    expected: Shapes = {EMBEDDING: (size, width), "output_norm.weight": (width,)}
    if not tied:
        expected[HEAD] = (size, width)
    allowed: Shapes = {}
    for layer in range(config.integer("num_hidden_layers")):
        shapes = family.shapes(config)
        expected |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        allowed |= {f"blk.{layer}.{name}.bias": shapes[name][:1] for name in family.biases}
    return expected, allowed


def _same(output: Weight | None, embedding: Weight | None) -> bool:
    """Whether one weight serves both ends. Like transformers, which does not tie two that differ, whatever is asked."""
    if output is None or embedding is None or output.shape != embedding.shape:
        return output is None
    return all(np.array_equal(one, other) for one, other in zip(output.rows(), embedding.rows(), strict=True))


def _stack_experts(directory: Path, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Weights with those of each block's experts as one."""
    found: dict[str, Weight] = {}
    experts: dict[str, dict[int, Weight]] = {}
    for name, weight in weights.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = weight
        else:
            found[name] = weight
    for name, parts in experts.items():
        if sorted(parts) != list(range(len(parts))) or len({part.shape for part in parts.values()}) != 1:
            raise FormatError(
                f"{directory}: expected experts of one shape without a gap in {quote(name)}, got {quote(sorted(parts))}"
            )
        found[name] = Weight(tuple(parts[number].parts[0] for number in sorted(parts)))
    return found


def _demand_shapes(
    directory: Path,
    found: Mapping[str, Weight],
    expected: Mapping[str, tuple[int, ...]],
    allowed: Mapping[str, tuple[int, ...]],
) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise FormatError(f"{directory}: expected a weight for {name}, found none; is the checkpoint complete?")
        if found[name].shape != shape:
            raise FormatError(f"{directory}: expected {name} as {shape} by config.json, got {found[name].shape}")
    for name, weight in found.items():
        if name not in expected and allowed.get(name) != weight.shape:
            raise SteerError(f"{directory}: {name} {weight.shape} has no place in llama.cpp's graph; {OTHER_WAY}")
