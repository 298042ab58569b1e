"""What llama.cpp is asked to load is looked at first, and why it refuses is told."""

from __future__ import annotations

import ctypes
import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from command import run, steering_for

pytest.importorskip("torch")
import tiny

from edge_steer import SteerError
from edge_steer.export.lora import export_adapter
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.llama_log import llama_errors

ONE: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    for family in ("llama", "qwen2"):
        tiny.build(family, place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return folder / "llama.gguf"


def changed(model: Path, target: Path, old: bytes, new: bytes) -> Path:
    """A copy of a model with some bytes of its metadata replaced by as many others."""
    whole = model.read_bytes()
    assert whole.count(old) == 1
    assert len(old) == len(new)
    target.write_bytes(whole.replace(old, new))
    return target


def trained_for(tokens: int) -> bytes:
    """How the tiny model's file says for how long a context it was trained."""
    return b"llama.context_length" + struct.pack("<II", gguf.GGUFValueType.UINT32, tokens)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b"gpt-2", b"gpt-9", "unknown pre-tokenizer type: 'gpt-9'"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight", "tensor 'blk.1.ffn_up.weight' not found"),
        (b"gpt-2", b"\x1b[2J\n", r"unknown pre-tokenizer type: '\x1b[2J"),
    ],
)
def test_why_llama_cpp_refuses_a_model_is_told_in_one_line(
    model: Path, tmp_path: Path, old: bytes, new: bytes, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = changed(model, tmp_path / "broken.gguf", old, new)
    found = run("generate", "-m", broken, "-p", "Hi", "--threads", 1)
    assert found.exit_code == 1
    assert why in found.stderr
    assert found.stderr.count("\n") == 1
    assert "".join(capfd.readouterr()) == ""


def test_why_llama_cpp_refuses_a_context_is_told(model: Path) -> None:
    with pytest.raises(SteerError, match=r"got: .*quantized V cache requires flash_attn"):
        SteeredLlama(model, type_v=llama_cpp.GGML_TYPE_Q8_0, flash_attn=False, n_ctx=256, **ONE)


def test_whoever_listens_to_llama_cpp_hears_on(model: Path, tmp_path: Path) -> None:
    heard: list[bytes] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(_: int, text: bytes, __: object) -> None:
        heard.append(text)

    with llama_errors():
        before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(listen, ctypes.c_void_p())
    try:
        for broken in (True, False):
            heard.clear()
            path = changed(model, tmp_path / "broken.gguf", b"gpt-2", b"gpt-9") if broken else model
            with pytest.raises(SteerError) if broken else nullcontext():
                SteeredLlama(path, n_ctx=256, **ONE)
            assert any(b"gpt-9" in text for text in heard) == broken
        heard.clear()
        llama_cpp.Llama(str(model), n_ctx=256, verbose=False, **ONE)
        assert heard, "still listening"
    finally:
        llama_cpp.llama_log_set(before, data)


def test_a_model_without_a_vocabulary_is_an_error_and_no_end_of_the_process(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="expected a model with a vocabulary"):
        SteeredLlama(changed(model, tmp_path / "none.gguf", b"gpt2", b"none"), n_ctx=256, **ONE)


@pytest.mark.parametrize(("trained", "context"), [(512, 512), (1000, 1024)])
@pytest.mark.parametrize("asked", [0, None])
def test_no_length_is_the_model_s_and_every_token_of_it_has_its_place(
    model: Path, tmp_path: Path, trained: int, context: int, asked: int | None
) -> None:
    path = changed(model, tmp_path / "long.gguf", trained_for(512), trained_for(trained))
    llm = SteeredLlama(path, steering=steering_for(model), angle=20, n_ctx=asked, **ONE)
    assert llm.n_ctx() == len(llm.input_ids) == context
    assert len(llm.logits([256] + [70] * (context - 1), 1)) == context - 1


def test_a_context_of_less_than_nothing_is_refused(model: Path) -> None:
    with pytest.raises(SteerError, match="expected n_ctx of 0, for the model's, or more, got -300"):
        SteeredLlama(model, n_ctx=-300, **ONE)


def test_a_model_trained_for_more_tokens_than_can_be_counted_is_refused(model: Path, tmp_path: Path) -> None:
    path = changed(model, tmp_path / "endless.gguf", trained_for(512), trained_for((1 << 32) - 1))
    with pytest.raises(SteerError, match=r"expected llama.context_length from 1 to 2147483647, got 4294967295"):
        SteeredLlama(path, n_ctx=0, **ONE)


def test_tokens_take_the_room_of_their_text_and_not_of_the_longest_context(model: Path, tmp_path: Path) -> None:
    path = changed(model, tmp_path / "long.gguf", trained_for(512), trained_for((1 << 31) - 1))
    llm, plain = (SteeredLlama(each, n_ctx=256, **ONE) for each in (path, model))
    for text in (b"", b"the", b"the \xc3\xa9nd" * 200):
        assert llm.tokenize(text) == plain.tokenize(text) == [256, *plain._model.tokenize(text, False, True)]


@pytest.mark.parametrize(
    ("name", "hint"), [("stering", "did you mean steering"), ("n_context", "n_ctx"), ("embeddings", "embedding")]
)
def test_an_argument_that_nobody_knows_is_refused(model: Path, name: str, hint: str) -> None:
    with pytest.raises(SteerError, match=f"got '{name}'.*{hint}"):
        SteeredLlama(model, **{name: 1}, **ONE)


def test_an_adapter_acts_beside_a_steering_and_one_that_does_not_fit_is_an_error(folder: Path, model: Path) -> None:
    how: dict[str, Any] = {"n_ctx": 256, **ONE}
    steering, other = steering_for(model), steering_for(folder / "qwen2.gguf")
    adapter, *_ = export_adapter(model, folder / "own", [(steering, 20)])
    foreign, *_ = export_adapter(folder / "qwen2.gguf", folder / "foreign", [(other, 20)])
    tokens = [256, 70, 80, 90]
    turned = SteeredLlama(model, steering=steering, angle=20, **how).logits(tokens, 1)
    with_adapter = SteeredLlama(model, lora_path=str(adapter), **how)
    assert abs(with_adapter.logits(tokens, 1) - turned).max() < 1e-2 * np.ptp(turned)
    with_adapter.close()
    steering.save(folder / "steering.gguf")
    for path in (foreign, folder / "steering.gguf"):
        with pytest.raises(SteerError, match=f"{path.name}: expected an adapter for this model, got: "):
            SteeredLlama(model, lora_path=str(path), **how)
    with pytest.raises(SteerError, match="got no file; check lora_path"):
        SteeredLlama(model, lora_path=str(folder / "none.gguf"), **how)
