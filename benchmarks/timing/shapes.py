"""GGUFs with the shape of a known model and random weights: what a speed costs, without the download.

A block of each weight's rows is drawn and quantized once, then repeated: a matrix product takes as long whatever the
numbers. Its words are numbered too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from edge_steer import tensor_types
from edge_steer.registry import cache_dir
from edge_steer.whole_file import whole_file

ROWS = 256  # in a block that is drawn


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; embeddings are tied here, as in the small Llama-3.2 models."""

    name: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int = 128256
    context: int = 131072

    @property
    def head_width(self) -> int:
        return self.width // self.heads


SHAPES = {
    "1b": Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8),
    "3b": Shape("Llama-3.2-3B", 28, 3072, 8192, 24, 8),
    "8b": Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8),
}


def build(name: str) -> Path:
    """The GGUF of SHAPES[name] as Q4_0 (embeddings Q6_K, norms F32, as llama.cpp makes it); made once, then cached."""
    shape = SHAPES[name]
    path = cache_dir() / "benchmarks" / f"{shape.name}-random.Q4_0.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            _write(part, shape)
    return path


def _write(path: Path, shape: Shape) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"{shape.name} shape, random weights")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e5)
    writer.add_rope_dimension_count(shape.head_width)
    _add_vocabulary(writer, shape.vocabulary)
    weights = list(_weights(shape))
    for tensor, rows, width, kind in weights:
        bytes_ = (rows, tensor_types.row_bytes(kind, width))
        stored = (width,) if rows == 1 else bytes_
        dtype = np.float32 if rows == 1 else np.uint8
        writer.add_tensor_info(tensor, stored, np.dtype(dtype), math.prod(bytes_), GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, rows, width, kind in weights:
        writer.write_tensor_data(_values(rng, rows, width, kind))
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """The bytes, and numbered words that nobody says: without a vocabulary no model is steered."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"word{number}" for number in range(size - len(special) - len(bytes_))]
    types = {gguf.TokenType.CONTROL: special, gguf.TokenType.BYTE: bytes_, gguf.TokenType.NORMAL: words}
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *bytes_, *words])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([kind for kind, tokens in types.items() for _ in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _weights(shape: Shape) -> Iterator[tuple[str, int, int, int]]:
    """Name, rows, width and ggml type of every tensor."""
    f32, q4, q6 = (int(GGMLQuantizationType[kind]) for kind in ("F32", "Q4_0", "Q6_K"))
    kv = shape.kv_heads * shape.head_width
    yield "token_embd.weight", shape.vocabulary, shape.width, q6
    for layer in range(shape.layers):
        for name, rows, width, kind in (
            ("attn_norm", 1, shape.width, f32),
            ("attn_q", shape.width, shape.width, q4),
            ("attn_k", kv, shape.width, q4),
            ("attn_v", kv, shape.width, q4),
            ("attn_output", shape.width, shape.width, q4),
            ("ffn_norm", 1, shape.width, f32),
            ("ffn_gate", shape.feed_forward, shape.width, q4),
            ("ffn_up", shape.feed_forward, shape.width, q4),
            ("ffn_down", shape.width, shape.feed_forward, q4),
        ):
            yield f"blk.{layer}.{name}.weight", rows, width, kind
    yield "output_norm.weight", 1, shape.width, f32


def _values(rng: np.random.Generator, rows: int, width: int, kind: int) -> NDArray[np.generic]:
    if rows == 1:
        return np.ones(width, np.float32)
    drawn = rng.standard_normal((ROWS, width), np.float32) / np.float32(math.sqrt(width))
    return np.resize(tensor_types.from_float(kind, drawn), (rows, tensor_types.row_bytes(kind, width)))
