"""A Hugging Face directory to one GGUF file, tensor by tensor: what is in memory at once is one block of rows.

`read` checks everything that can be checked without touching the weights; `write` then writes, whole or not at all.
Letters: m rows, d columns of a weight.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from numpy.typing import NDArray

from edge_steer import steering_file
from edge_steer.architectures import architecture
from edge_steer.checkpoint import Config, read_config
from edge_steer.converters.family import OTHER_WAY, Family, Keys, common_keys, note_window, rope
from edge_steer.converters.gemma2 import GEMMA2
from edge_steer.converters.gemma3 import GEMMA3
from edge_steer.converters.llama import LLAMA, MISTRAL, MIXTRAL
from edge_steer.converters.phi3 import PHI3
from edge_steer.converters.quantize import file_type, quantize_file
from edge_steer.converters.qwen2 import QWEN2, QWEN2_MOE
from edge_steer.converters.qwen3 import QWEN3
from edge_steer.converters.same_tokens import demand_same_tokens
from edge_steer.converters.vocabulary import Vocabulary, read_vocabulary
from edge_steer.converters.weights import Weight, read_weights
from edge_steer.errors import FormatError, SteerError, shown
from edge_steer.export import ggml
from edge_steer.export.changes import Changes
from edge_steer.export.folding import EMBEDDING, HEAD, folding
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import linear_actions
from edge_steer.provenance import BaseModel
from edge_steer.steering import Steering, metadata
from edge_steer.whole_file import whole_file

# By config.json's model_type.
FAMILIES: dict[str, Family] = {
    "llama": LLAMA, "mistral": MISTRAL, "mixtral": MIXTRAL, "qwen2": QWEN2, "qwen2_moe": QWEN2_MOE, "qwen3": QWEN3,
    "gemma2": GEMMA2, "gemma3": GEMMA3, "gemma3_text": GEMMA3, "phi3": PHI3,
}  # fmt: skip
TYPES = {
    "f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}  # fmt: skip
# Left behind by older files, computed anew by every engine; and the half of a multimodal model that reads images.
_UNUSED = re.compile(r".*rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*")
_EXPERT = re.compile(r"(.*\.experts)\.([0-9]{1,6})\.(.*)")


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

    Warns of what llama.cpp computes otherwise. Raises SteerError where the directory is broken, the family not one of
    FAMILIES, or llama.cpp has no form of what the configuration asks for.
    """
    directory = Path(directory)
    config = read_config(directory)
    family = FAMILIES.get(config.values["model_type"])
    if family is None:
        known = ", ".join(FAMILIES)
        raise SteerError(
            f"{config.path}: expected model_type {known}, got {shown(config.values['model_type'])}; {OTHER_WAY}"
        )
    config = config.with_defaults(family.defaults)
    activation = config.get("hidden_activation", config.get("hidden_act", family.activation))
    if activation != family.activation:
        raise SteerError(
            f"{config.path}: expected activation {family.activation}, got {shown(activation)}; {OTHER_WAY}"
        )
    family.check(config)
    if family.arch not in ("gemma2", "gemma3") and (note := note_window(config)):
        warnings.warn(note, stacklevel=2)
    weights = _weights(directory, config, family)
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


# --- weights --------------------------------------------------------------------------------------------------------


def _weights(directory: Path, config: Config, family: Family) -> dict[str, Weight]:
    """Every weight by its GGUF name and in its GGUF form. Raises FormatError where one is missing, too many or of
    another shape than the configuration says."""
    layers, width = config.integer("num_hidden_layers"), config.integer("hidden_size")
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    weights = _stacked(directory, read_weights(directory))
    if layers > len(weights):
        raise FormatError(f"{config.path}: expected at most {len(weights)} layers for as many weights, got {layers}")
    names = get_tensor_name_map(MODEL_ARCH(arch), layers)
    found: dict[str, Weight] = {}
    for tensor, weight in weights.items():
        stem, _, kind = tensor.replace("language_model.", "").rpartition(".")
        if not stem.startswith(("model.", "lm_head")):
            stem = f"model.{stem}"
        name = names.get_name(stem)
        if _UNUSED.fullmatch(tensor):
            continue
        if name is None or kind not in ("weight", "bias"):
            raise SteerError(f"{directory}: {shown(tensor)} has no place in llama.cpp's {family.arch}; {OTHER_WAY}")
        found[f"{name}.{kind}"] = family.form(config, f"{name}.{kind}", weight)

    embedding = found["token_embd.weight"].shape if "token_embd.weight" in found else ()
    size = config.integer("vocab_size", embedding[0] if embedding else 1)
    expected = {"token_embd.weight": (size, width), "output_norm.weight": (width,)}
    if config.get("tie_word_embeddings") and _same(found.get("output.weight"), found.get("token_embd.weight")):
        found.pop("output.weight", None)
    else:
        expected["output.weight"] = (size, width)
    allowed: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        shapes = family.shapes(config)
        expected |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        allowed |= {f"blk.{layer}.{name}.bias": shapes[name][:1] for name in family.biases}
    _demand_shapes(directory, found, expected, allowed)
    if family.tied_only and "output.weight" in found:
        raise SteerError(f"{directory}: llama.cpp's {family.arch} has no output weight of its own; {OTHER_WAY}")
    return {name: found[name] for name in (*expected, *allowed) if name in found}


def _same(output: Weight | None, embedding: Weight | None) -> bool:
    """Whether one weight serves both ends. Like transformers, which does not tie two that differ, whatever is asked."""
    if output is None or embedding is None or output.shape != embedding.shape:
        return output is None
    return all(np.array_equal(one, other) for one, other in zip(output.rows(), embedding.rows(), strict=True))


def _stacked(directory: Path, weights: Mapping[str, Weight]) -> dict[str, Weight]:
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
                f"{directory}: expected experts of one shape without a gap in {shown(name)}, got {shown(sorted(parts))}"
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


# --- the file -------------------------------------------------------------------------------------------------------


def write(
    source: Source,
    output: str | Path,
    *,
    type: str | None = None,
    quantize: str | None = None,
    changes: Changes | None = None,
    allow_other_tokens: bool = False,
    embed: Sequence[Steering] = (),
    threads: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Write `source` as the GGUF `output`, whole or not at all.

    type:      one of TYPES; with `quantize` the type of the file that llama.cpp's quantizer reads. None: source.type.
    quantize:  one of quantize.FILE_TYPES, written by llama.cpp itself.
    changes:   steerings to fold into the weights before any rounding, as `baking` makes them.
    allow_other_tokens: warn where llama.cpp and the tokenizer split text differently, instead of refusing.
    embed:     steerings to put beside the weights. threads: for the quantizer, None for all.
    Raises SteerError where `output` exists and `force` is not given, where llama.cpp and the tokenizer split text
    differently, or a weight does not fit the type.
    """
    output = Path(output)
    kind = TYPES[type or source.type]
    if quantize is not None:
        file_type(quantize)  # refuses an unknown name before any work
        if kind == GGMLQuantizationType.Q8_0:
            raise SteerError(f"expected f32, f16 or bf16 to quantize to {quantize} from, got {type}; leave --type out")
    extra = metadata(embed) if embed else {}
    for steering in embed:
        _note(steering.check_fits(source.base))
    with (
        whole_file(output, force=force) as part,
        tempfile.TemporaryDirectory(dir=output.parent, prefix=".convert-") as at,
    ):
        first = Path(at) / "model.gguf"
        _write_file(first, source, kind, extra, {})
        for difference in demand_same_tokens(first, source.vocabulary, allow=allow_other_tokens):
            warnings.warn(difference, stacklevel=2)
        with progress("writing", len(source.weights)) as step:
            _write_file(first if quantize else part, source, kind, extra, source.weights, changes, step)
        if quantize:
            with progress(f"quantizing to {quantize}", len(source.weights)) as step:
                quantize_file(first, part, quantize, threads=threads, step=step)


def _note(warning: str | None) -> None:
    if warning:
        warnings.warn(warning, stacklevel=3)


def baking(source: Source, steering: Sequence[tuple[Steering, float | None]]) -> tuple[Source, Changes | None]:
    """The source and what `write` needs to turn each (steering, dial) into its weights; None where none is on.

    Where the head is the embedding and is turned, the source returned has it as a weight of its own.
    """
    for each, _ in steering:
        _note(each.check_fits(source.base))
    dialled = [(each, dial) for each, dial in steering if each.action(dial) is not None]
    if not dialled:
        return source, None
    on, actions = linear_actions(dialled)

    def vector(name: str) -> NDArray[np.float64]:
        return np.concatenate([rows.ravel() for rows in source.weights[name].rows()]).astype(np.float64)

    folded = folding(on, architecture(source.family.arch), source.weights, vector)
    if folded.untied:
        if source.family.tied_only:
            raise SteerError(f"llama.cpp's {source.family.arch} has no head of its own, so nothing is turned before it")
        source = replace(source, weights={**source.weights, HEAD: source.weights[EMBEDDING]})
    return source, Changes(folded, actions, vector)


def _type_of(name: str, weight: Weight, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors, routers and rotary factors stay F32 as llama.cpp computes with them; rows must be whole blocks."""
    if len(weight.shape) == 1 or ".ffn_gate_inp." in name:
        return GGMLQuantizationType.F32
    return kind if weight.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _write_file(
    path: Path,
    source: Source,
    kind: GGMLQuantizationType,
    extra: Mapping[str, Any],
    weights: Mapping[str, Weight],
    changes: Changes | None = None,
    step: Callable[[int], None] = lambda steps: None,
) -> None:
    writer = GGUFWriter(path, source.family.arch)
    try:
        writer.add_type("model")
        writer.add_name(source.name)
        writer.add_file_type(file_type(kind.name))
        writer.add_quantization_version(2)
        for key, value in source.keys.items():
            _add(writer, key, value)
        source.vocabulary.add_to(writer)
        steering_file.add_metadata(writer, extra)
        types = {name: _type_of(name, weight, kind) for name, weight in weights.items()}
        for name, weight in weights.items():
            block, bytes_ = GGML_QUANT_SIZES[types[name]]
            writer.add_tensor_info(name, weight.shape, np.dtype(np.float32), weight.size // block * bytes_, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out = writer.fout[0]
        writer.write_padding(out, out.tell())
        for name, weight in weights.items():
            for block_of_rows in _encoded(name, weight, types[name], changes):
                out.write(block_of_rows.data)
            writer.write_padding(out, out.tell())
            step(1)
    finally:
        writer.close()


def _encoded(name: str, weight: Weight, kind: GGMLQuantizationType, changes: Changes | None) -> Iterator[NDArray[Any]]:
    for turned in weight.rows() if changes is None or name not in changes else changes.rows(name, weight.rows):
        if not np.isfinite(turned).all():
            raise FormatError(f"{name}: expected numbers, got NaN or infinity; is the checkpoint whole?")
        if kind == GGMLQuantizationType.F16 and float(np.abs(turned).max()) > float(np.finfo(np.float16).max):
            raise SteerError(
                f"{name}: expected numbers that F16 can hold, got {np.abs(turned).max():g}; use --type bf16"
            )
        yield ggml.from_float(int(kind), turned)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)
