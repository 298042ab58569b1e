"""A model read by `source.py` written as one GGUF, tensor by tensor: what is in memory at once is one block of rows.

Letters: m rows, d columns of a weight.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from edge_steer import steering_file, tensor_types
from edge_steer.converters.quantize import file_type, quantize_file
from edge_steer.converters.same_tokens import demand_same_tokens
from edge_steer.converters.source import Source
from edge_steer.converters.weights import Weight
from edge_steer.errors import FormatError, SteerError
from edge_steer.export.changes import Changes
from edge_steer.export.progress import Progress, no_progress
from edge_steer.steering import Steering, metadata
from edge_steer.whole_file import whole_file

TYPES = {
    "f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}  # fmt: skip


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
    Raises SteerError if `output` exists and `force` is not given, where llama.cpp and the tokenizer split text
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
        if warning := steering.check_fits(source.base):
            warnings.warn(warning, stacklevel=2)
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
            for block_of_rows in _encode(name, weight, types[name], changes):
                out.write(block_of_rows.data)
            writer.write_padding(out, out.tell())
            step(1)
    finally:
        writer.close()


def _encode(name: str, weight: Weight, kind: GGMLQuantizationType, changes: Changes | None) -> Iterator[NDArray[Any]]:
    for turned in weight.rows() if changes is None or name not in changes else changes.rows(name, weight.rows):
        if not np.isfinite(turned).all():
            raise FormatError(f"{name}: expected numbers, got NaN or infinity; is the checkpoint whole?")
        if kind == GGMLQuantizationType.F16 and float(np.abs(turned).max()) > float(np.finfo(np.float16).max):
            raise SteerError(
                f"{name}: expected numbers that F16 can hold, got {np.abs(turned).max():g}; use --type bf16"
            )
        yield tensor_types.from_float(int(kind), turned)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)
