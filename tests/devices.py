"""What the tests of the ways to a tensor's memory share: the same logits, whatever the way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char_p, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray
from planted import DIAL, random_steering

from edge_steer import ggml
from edge_steer.architectures import architecture
from edge_steer.choices import Operator
from edge_steer.model_file import read_model
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering

BATCHES = (1, 7, 512, 700)
EXACT: dict[str, Any] = {
    "type_k": llama_cpp.GGML_TYPE_F32,
    "type_v": llama_cpp.GGML_TYPE_F32,
    "n_threads": 1,
    "n_threads_batch": 1,
}
TOLERANCE = 1e-4  # of the logits' range
CPU_ONLY: dict[str, Any] = {
    "n_gpu_layers": 0,
    "split_mode": llama_cpp.LLAMA_SPLIT_MODE_NONE,
    "main_gpu": -1,
}  # large batches too


@cache
def gpus() -> int:
    """This machine's GPUs, with those of GGML_BACKEND_PATH: ggml itself loads it only where it has no backend."""
    if path := os.environ.get("GGML_BACKEND_PATH"):
        load = ggml.registry().ggml_backend_load
        load.restype, load.argtypes = c_void_p, [c_char_p]
        assert load(path.encode()), f"ggml does not load {path}"
    return len(ggml.local_devices(ggml.GPU) + ggml.local_devices(ggml.INTEGRATED_GPU))


def steerings_for(path: Path, operator: Operator, count: int) -> list[Steering]:
    """One steering, or three, the operator in question first; their masks differ."""
    file = read_model(path)
    sites = architecture(file.architecture).sites(file.block_count)
    operators: tuple[Operator, ...] = (operator, "selective", "ablation")
    made = [
        random_steering(file.base, sites, each, seed=i, name=f"{i} {each}") for i, each in enumerate(operators[:count])
    ]
    return [
        each.with_(mask=np.array([(number + i) % 3 > 0 or i == 0 for number in range(len(sites))]))
        for i, each in enumerate(made)
    ]


def logits_by_batch(llm: SteeredLlama) -> Iterator[NDArray[np.float32]]:
    """The last token's logits after prompts of BATCHES tokens, each evaluated from the start."""
    for count in BATCHES:
        llm.reset()
        llm.eval([256, *(30 + i % 200 for i in range(count - 1))])
        yield np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


@contextmanager
def path_forced(way: str) -> Iterator[None]:
    """EDGE_STEER_HOOK for hooks that are made within."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_STEER_HOOK", way)
        yield


def open_forced(path: Path, way: str, steerings: Sequence[Steering], **llama: object) -> SteeredLlama:
    """The model, steered by every steering at its operator's dial, with the way to memory forced."""
    with path_forced(way):
        dials = {each.name: DIAL[each.operator] for each in steerings}
        return SteeredLlama(path, steering=steerings, angles=dials, engine="hook", n_ctx=768, **EXACT | llama)
