"""What the tests of exports share: plain llama.cpp with adapters, and how two sets of logits are compared."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray
from planted import random_steering

from edge_steer.architectures import architecture
from edge_steer.choices import Operator
from edge_steer.measure.metrics import log_softmax
from edge_steer.model_file import read_model
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering

TOKENS = [256, *range(40, 90)]
EXACT: dict[str, Any] = {
    "type_k": llama_cpp.GGML_TYPE_F32,
    "type_v": llama_cpp.GGML_TYPE_F32,
    "n_threads": 1,
    "n_threads_batch": 1,
}
ANGLES = (-12.0, 8.0, 90.0, 180.0)
Logits = NDArray[np.float32]


def steering_for(gguf: Path, operator: Operator = "selective", sites: str = "pre", **kwargs: Any) -> Steering:
    file = read_model(gguf)
    chosen = architecture(file.architecture).sites(file.block_count, sites)
    return random_steering(file.base, chosen, operator, **kwargs)


def hook_logits(
    gguf: Path, actions: Sequence[tuple[Steering, float | None]], tokens: Sequence[int] = TOKENS, **llama: Any
) -> Logits:
    dials = {steering.name: dial for steering, dial in actions}
    steerings = [steering for steering, _ in actions]
    llm = SteeredLlama(gguf, steering=steerings, angles=dials, n_ctx=128, **{**EXACT, **llama})
    return llm.logits([*tokens, 0], 1)


def plain_logits(
    gguf: Path, adapters: Sequence[tuple[Path, float]] = (), vector: Logits | None = None,
    tokens: Sequence[int] = TOKENS,
) -> Logits:  # fmt: skip
    """Logits of llama.cpp without edge-steer; with adapters at scales, or a control vector (layers − 1, d)."""
    llm = llama_cpp.Llama(str(gguf), n_ctx=128, logits_all=True, verbose=False, **EXACT)
    loaded = [llama_cpp.llama_adapter_lora_init(llm._model.model, str(path).encode()) for path, _ in adapters]
    assert all(loaded)
    if loaded:
        kinds = llama_cpp.llama_adapter_lora_p_ctypes * len(loaded), ctypes.c_float * len(loaded)
        scales = [scale for _, scale in adapters]
        assert not llama_cpp.llama_set_adapters_lora(llm._ctx.ctx, kinds[0](*loaded), len(loaded), kinds[1](*scales))
    if vector is not None:
        flat = np.ascontiguousarray(vector, np.float32).ravel()
        pointer = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert not llama_cpp.llama_set_adapter_cvec(
            llm._ctx.ctx, pointer, flat.size, vector.shape[1], 1, len(vector) + 1
        )
    llm.eval(tokens)
    return np.array(llm.scores[: len(tokens)], np.float32)


def kl(p: Logits, q: Logits) -> float:
    """Mean KL(p‖q) over the rows of two sets of logits."""
    a, b = log_softmax(p.astype(np.float64)), log_softmax(q.astype(np.float64))
    return float((np.exp(a) * (a - b)).sum(axis=-1).mean())


def assert_same(found: Logits, expected: Logits, unsteered: Logits | None = None) -> None:
    """Logits agree; and differ from the unsteered ones by far more."""
    reach = max(1.0, float(np.ptp(expected)) / 10)
    assert np.abs(found - expected).max() <= 1e-3 * reach
    assert kl(expected, found) <= 1e-6
    if unsteered is not None:
        assert np.abs(expected - unsteered).max() > 1e-2 * reach


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    return {family: tiny.build(family, folder) for family in tiny.FAMILIES}
