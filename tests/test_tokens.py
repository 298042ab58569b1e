"""Tokens: nothing behind a prompt, long tokens whole, and text composed as the model's tokenizer had it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from command import run

from edge_steer.export.gguf_bytes import head, map_model
from edge_steer.gguf_metadata import Value
from edge_steer.model_file import read_model
from edge_steer.runtime.llama import SteeredLlama

pytest.importorskip("torch")
import tiny

ONE: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
LONG = "<|" + "x" * 100 + "|>"


def with_keys(source: Path, target: Path, **keys: Value) -> Path:
    """A copy of a model with more metadata."""
    mapped = map_model(read_model(source))
    added = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    target.write_bytes(head(mapped, mapped.model.tensors, added) + mapped.data[mapped.model.data_start :].tobytes())
    return target


@pytest.fixture
def adds_eos(model: Path, tmp_path: Path) -> Path:
    return with_keys(model, tmp_path / "eos.gguf", add_eos_token=Value(gguf.GGUFValueType.BOOL, True))


def test_no_eos_stands_behind_a_prompt_whatever_the_vocabulary_asks(adds_eos: Path, model: Path) -> None:
    asking, plain = SteeredLlama(adds_eos, **ONE), SteeredLlama(model, **ONE)
    assert asking._model.tokenize(b"the", True, True)[-1] == asking.token_eos(), "llama.cpp itself adds one"
    for text in ("the", "<|bos|>the", ""):
        assert asking.text_tokens(text) == plain.text_tokens(text)
    assert asking.tokenize(b"the", add_bos=True) == [asking.token_bos(), *plain.tokenize(b"the", add_bos=False)]


def test_transformers_adds_no_eos_either(model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    from edge_steer.calibration.torch_recorder import TorchRecorder

    recorder = TorchRecorder.load(model.with_suffix(""), device="cpu")
    expected = SteeredLlama(model, **ONE).text_tokens("the end")
    assert recorder.text_tokens("the end") == expected
    recorder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", 256), ("<|end|>", 257)]
    )
    assert recorder.tokenizer("the end")["input_ids"][-1] == 257
    assert recorder.text_tokens("the end") == expected


def test_a_token_of_more_than_32_bytes_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [*tiny._tokens()[:-1], LONG]
    monkeypatch.setattr(tiny, "_tokens", lambda: tokens)
    llm = SteeredLlama(tiny.build("llama", tmp_path).gguf_path, **ONE)
    number = tokens.index(LONG)
    assert llm._model.detokenize([number], True) != LONG.encode(), "as llama-cpp-python has it"
    assert llm.detokenize([number], special=True) == LONG.encode()


def test_every_token_of_a_real_vocabulary_has_its_text(smollm2: Path) -> None:
    llm = SteeredLlama(smollm2, **ONE)
    pieces = [llm.detokenize([token], special=True) for token in range(llm.n_vocab())]
    assert all(pieces)
    assert max(map(len, pieces)) > 32


def decomposed() -> Iterator[str]:
    for text in ("café", "Ångström", "한국어", "plain"):
        yield unicodedata.normalize("NFD", text)


def test_qwens_text_is_composed_before_it_is_split(model: Path, tmp_path: Path) -> None:
    plain = SteeredLlama(model, **ONE)
    assert plain.metadata["tokenizer.ggml.pre"] == "gpt-2"
    other = tmp_path / "pre.gguf"
    other.write_bytes(model.read_bytes().replace(b"gpt-2", b"qwen2"))
    composing = SteeredLlama(other, **ONE)
    for text in decomposed():
        assert composing.text_tokens(text) == composing.text_tokens(unicodedata.normalize("NFC", text))
        assert plain.detokenize(plain.text_tokens(text)) == text.encode()


def test_an_empty_answer_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SteeredLlama, "piece", lambda self, token: None)
    found = run("generate", "-m", model, "-p", "the", "--ctx", 256, "--threads", 1)
    assert found.exit_code == 0
    assert "the answer is empty" in found.stderr
