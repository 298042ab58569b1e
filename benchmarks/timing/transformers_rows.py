"""transformers with forward hooks, as the published method runs, but turning at rank 2 instead of by d×d matrices."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from timing.decoding import ANGLE, PROMPT
from timing.rounds import Row
from timing.shapes import Shape

from edge_steer.architectures import architecture
from edge_steer.rotation import cos_sin
from edge_steer.sites import Site, site_of_module
from edge_steer.steering import Steering

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
warnings.filterwarnings("ignore", "`past_key_values` is deprecated")  # its new name is not in every release we take

GENERATED = 16  # slower by far: fewer tokens say as much


use_threads = torch.set_num_threads


def directory_of(gguf: Path, folder: Path) -> Path:
    """The model as transformers saves what it reads from the GGUF, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )  # fmt: skip
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    """The model in a directory, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def of_shape(shape: Shape) -> Any:
    """A bfloat16 Llama of this shape, all weights alike: a matrix product takes as long whatever the numbers."""
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb.__init__(config=config)  # its frequencies are computed, not loaded
    model.tie_weights()
    for weight in model.parameters():
        weight.data.fill_(0.01)
    return model.eval()


def transformers_rows(model: Any, what: str, steerings: Sequence[Steering], against: str) -> list[Row]:
    """No hooks, then one steering of `steerings` at a time."""
    names = [
        f"transformers ({what}), no hooks",
        *(f"transformers ({what}), hooks at {len(s.steered)} sites" for s in steerings),
    ]
    return [Row(name, _run(model, steering), against) for name, steering in zip(names, (None, *steerings), strict=True)]


def _run(model: Any, steering: Steering | None) -> Callable[[], Mapping[str, float]]:
    @torch.inference_mode()
    def run() -> Mapping[str, float]:
        with _hooked(model, steering):
            tokens = torch.arange(1000, 1000 + PROMPT)[None]
            begun = time.perf_counter()
            found = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
            evaluated = time.perf_counter() - begun
            spent = []
            for i in range(GENERATED):
                begun = time.perf_counter()
                found = model(
                    input_ids=torch.tensor([[2000 + i]]), past_key_values=found.past_key_values, use_cache=True
                )
                spent.append(time.perf_counter() - begun)
        return {"prompt": evaluated / PROMPT, "generation": float(np.median(spent))}

    return run


@contextmanager
def _hooked(model: Any, steering: Steering | None) -> Iterator[None]:
    known = architecture("llama")
    modules: dict[Site | None, Any] = {site_of_module(known, name): module for name, module in model.named_modules()}
    handles = [
        modules[site].register_forward_hook(_turn(torch.from_numpy(steering.basis_at(site).copy()).to(model.dtype)))
        for site in (steering.steered if steering else ())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turn(basis: torch.Tensor) -> Callable[..., torch.Tensor]:
    """h + (h Bᵀ) G B with B (2, d), G = (cosθ − 1) I + sinθ J transposed for rows."""
    c, s = cos_sin(ANGLE)
    core = torch.tensor([[c - 1, s], [-s, c - 1]], dtype=basis.dtype)
    return lambda _module, _inputs, h: h + h @ basis.T @ core @ basis
