"""What tests of conversion share: directories that say something else, and GGUF files held against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import tiny
from gguf import GGUFReader, ReaderTensor, dequantize
from safetensors.torch import load_file, save_file

from edge_steer.converters.baking import baking
from edge_steer.converters.source import Source, read
from edge_steer.converters.write import write
from edge_steer.steering import Steering

TOKENS = [256, *range(30, 90)]


def directory_of(gguf: Path, folder: Path, dtype: str) -> Path:
    """The model as transformers saves what it reads from the GGUF."""
    import transformers

    options = {"gguf_file": gguf.name}
    plain = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=plain, dtype=dtype, **options
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)
    return folder


def convert(
    directory: Path,
    output: Path,
    *,
    pre: str | None = None,
    steering: Sequence[tuple[Steering, float | None]] = (),
    **options: Any,
) -> Source:
    """`read` and `write` in one, with steerings folded in."""
    source, changes = baking(read(directory, pre=pre), steering)
    write(source, output, changes=changes, **options)
    return source


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the JSON file in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def variant(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a directory whose config.json says something else."""
    copy = Path(shutil.copytree(source, target))
    edit(copy / "config.json", lambda values: values.update(config))
    return copy


def tensors(path: Path) -> dict[str, ReaderTensor]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def values(tensor: ReaderTensor) -> np.ndarray:
    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def open_llama(path: Path, n_ctx: int = 256) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path), n_ctx=n_ctx, n_threads=1, n_threads_batch=1, logits_all=True, flash_attn=False, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip


def llama_logits(model: Path | llama_cpp.Llama, tokens: list[int], n_ctx: int = 256) -> np.ndarray:
    llama = open_llama(model, n_ctx) if isinstance(model, Path) else model
    llama.reset()
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)])


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean KL over the tokens."""

    def log_p(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_p(expected), log_p(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def assert_same_model(
    hf_dir: Path, gguf: Path, tokens: list[int] = TOKENS, n_ctx: int = 256, most: float = 1e-6
) -> None:
    expected = tiny.torch_logits(hf_dir, tokens)
    assert np.ptp(expected) > 5
    kl = divergence(expected, llama_logits(gguf, tokens, n_ctx))
    print(f"{gguf.name}: KL {kl:.1e}")
    assert kl <= most


def nothing_left(folder: Path, *allowed: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(allowed)


def rewrite(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the weights of a directory in place."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
