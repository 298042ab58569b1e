"""What the hook cannot act on ends as a named error on that very call, and the next request works."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import random_steering

pytest.importorskip("torch")
pytest.importorskip("transformers")


from edge_steer import SteerError
from edge_steer.architectures import architecture
from edge_steer.model_file import read_model
from edge_steer.runtime import hooked_llama as seam
from edge_steer.runtime import native
from edge_steer.runtime.hook import _STATUS, Hook
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering

ONE_THREAD: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "n_ctx": 768}
TOKENS = [256, *range(40, 60)]
_NO = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _: False)


def steering_for(model: Path, seed: int = 0, name: str = "random") -> Steering:
    file = read_model(model)
    return random_steering(file.base, architecture(file.architecture).sites(file.block_count), seed=seed, name=name)


# What a ggml that lies makes of the model's tensors: the message, and the field of steer_ggml.
LIES = {
    "not F32": ("type_f32", 1),
    "not contiguous": ("ggml_is_contiguous", ctypes.cast(_NO, ctypes.c_void_p).value),
    "memory it cannot reach": ("ggml_backend_buffer_is_host", ctypes.cast(_NO, ctypes.c_void_p).value),
}


def lying_hook(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    field, value = LIES[message]
    true = native.bound_ggml()
    lie = type(true)(*(getattr(true, each[0]) for each in true._fields_))
    setattr(lie, field, value)
    monkeypatch.setattr(native, "bound_ggml", lambda: lie)
    monkeypatch.setenv("EDGE_STEER_HOOK", "host")


@pytest.mark.parametrize("message", LIES)
def test_a_tensor_that_is_not_as_expected_is_a_named_error_on_that_call(
    model: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    expected = SteeredLlama(model, steering=(), **ONE_THREAD).logits([*TOKENS, 0], 1)
    lying_hook(monkeypatch, message)
    llm = SteeredLlama(model, steering=steering_for(model), angle=20, **ONE_THREAD)
    for _ in range(2):
        with pytest.raises(SteerError, match=rf"{message} at blk\.0\.attn_norm"):
            llm.eval([256, *(30 + i % 200 for i in range(600))])  # two decodes
        assert llm.n_tokens == 0
        with pytest.raises(SteerError, match=message):
            next(llm.generate(TOKENS, temp=0.0))
    assert llm.sites_hit == 0
    llm.angle = None
    assert (llm.logits([*TOKENS, 0], 1) == expected).all()


def test_a_site_of_another_width_is_a_named_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(Hook):
        def __init__(self, arch: object, sites: object, width: int) -> None:
            super().__init__(arch, sites, width // 2)  # type: ignore[arg-type]

    monkeypatch.setattr(seam, "Hook", Narrow)
    llm = SteeredLlama(model, steering=steering_for(model), angle=20, **ONE_THREAD)
    with pytest.raises(SteerError, match=r"another width at blk\.0\.attn_norm"):
        llm.eval(TOKENS)


def test_memory_that_is_no_host_s_and_no_device_s_is_copied(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steering = steering_for(model)
    expected = SteeredLlama(model, steering=steering, angle=20, **ONE_THREAD).logits([*TOKENS, 0], 1)
    lying_hook(monkeypatch, "memory it cannot reach")
    monkeypatch.setenv("EDGE_STEER_HOOK", "auto")
    llm = SteeredLlama(model, steering=steering, angle=20, **ONE_THREAD)
    assert (llm.logits([*TOKENS, 0], 1) == expected).all()
    monkeypatch.setenv("EDGE_STEER_HOOK", "device")
    with pytest.raises(SteerError, match="device cannot turn it"):
        SteeredLlama(model, steering=steering, angle=20, **ONE_THREAD).eval(TOKENS)


def test_a_basis_that_is_not_finite_never_reaches_a_tensor(model: Path) -> None:
    file = read_model(model)
    sites = architecture(file.architecture).sites(file.block_count)
    hook = Hook(architecture(file.architecture), sites, file.embedding_length)
    basis = np.full((1, 2, file.embedding_length), np.nan, np.float32)
    site, number = np.zeros(1, np.int32), ctypes.c_int32()
    status = hook._lib.steer_add(
        hook._pointer, 0, 1, site.ctypes.data, site.ctypes.data, None, 1, basis.ctypes.data, ctypes.byref(number)
    )
    assert "bad argument" in _STATUS[status]


def test_two_models_with_two_steerings_in_two_threads_do_not_touch(model: Path) -> None:
    def answers(llm: SteeredLlama) -> list[np.ndarray]:
        found = []
        for angle in (5, -30, 90) * 5:
            llm.angle = angle
            found.append(llm.logits([*TOKENS, 0], 1))
        return found

    llms = [SteeredLlama(model, steering=steering_for(model, seed), angle=5, **ONE_THREAD) for seed in (0, 1)]
    alone = [answers(llm) for llm in llms]
    together: list[list[np.ndarray]] = [[], []]

    def run(number: int) -> None:
        together[number] = answers(llms[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert [(a == b).all() for a, b in zip(one, other, strict=True)] == [True] * len(one)
    assert any((a != b).any() for a, b in zip(*alone, strict=True))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_c_library_passes_its_own_test_on_a_fake_ggml(tmp_path: Path) -> None:
    root = Path(__file__).parents[1] / "native"
    sources = [*root.glob("*.c"), root / "tests" / "fake_ggml.c", root / "tests" / "test_steer.c"]
    program = tmp_path / "test_steer"
    command = ["cc", "-std=gnu11", "-O1", "-I", str(root), *map(str, sources), "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
