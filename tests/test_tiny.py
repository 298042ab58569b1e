"""The tiny models are what they claim: one model in two forms. Everything that compares engines stands on this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny  # noqa: E402

from edge_steer.provenance import BaseModel  # noqa: E402
from edge_steer.sites import Site  # noqa: E402
from edge_steer.steering import Steering  # noqa: E402

TEXT = "The other painter thinks: 'In 1999 the rain fell on Anne's hat, then stopped.'"


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyModel:
    return tiny.build(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llama(model: tiny.TinyModel) -> Any:
    return llama_cpp.Llama(
        str(model.gguf_path), n_ctx=256, n_threads=2, n_threads_batch=2, logits_all=True, flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
    )  # fmt: skip


def llama_logits(llama: Any, tokens: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)])


def test_llama_cpp_and_transformers_give_the_same_logits(model: tiny.TinyModel, llama: Any) -> None:
    tokens = llama.tokenize(TEXT.encode(), add_bos=True, special=True)
    expected = tiny.torch_logits(model.hf_dir, tokens)
    spread = float(np.ptp(expected))
    error = float(np.abs(llama_logits(llama, tokens) - expected).max()) / spread
    print(f"{model.family}: logits spread {spread:.2f}, largest difference {error:.1e} of it")
    assert spread > 5, "logits must differ clearly between tokens"
    assert expected.std(0).max() > 0.2, "logits must depend on the text"
    assert error < 1e-4


def test_both_tokenizers_agree(model: tiny.TinyModel, llama: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.hf_dir)
    chat = "<|bos|><|user|>Is the weather fine?\n\n  No!<|end|><|assistant|>"
    for text in (TEXT, "x", "  two  spaces\tand a tab\n", "naïve façade — 東京 🌧", chat):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == llama.tokenize(
            text.encode(), add_bos=False, special=True
        )
    assert tokenizer(TEXT)["input_ids"] == llama.tokenize(TEXT.encode(), add_bos=True, special=True)
    assert tokenizer.chat_template == llama.metadata["tokenizer.chat_template"] == tiny.CHAT_TEMPLATE


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    first, again, other = (
        tiny.build("llama", tmp_path / name, seed).gguf_path.read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first != other


def test_the_reference_engine_applies_a_steering_only_where_and_while_it_is_on(tmp_path: Path) -> None:
    model = tiny.build("llama", tmp_path)
    basis = np.eye(2, tiny.WIDTH, dtype=np.float32)[None]
    base = BaseModel("llama", tiny.NAME, tiny.LAYERS, tiny.WIDTH)
    sites = (Site(0, "attn_norm"), Site(2, "ffn_norm"))
    steering = Steering("x", "selective", "global", sites, np.array([False, True]), np.zeros(2, np.uint32), basis, base)
    tokens = list(TEXT.encode())
    plain = tiny.torch_logits(model.hf_dir, tokens)
    turned = tiny.torch_logits(model.hf_dir, tokens, [(steering, 90.0)])
    assert np.abs(turned - plain).max() > 0.1
    for off in ([(steering, None)], [(steering, 0.0)], [(steering, 360.0)]):
        assert np.array_equal(tiny.torch_logits(model.hf_dir, tokens, off), plain)
    back = tiny.torch_logits(model.hf_dir, tokens, [(steering, 90.0), (steering, -90.0)])
    assert np.abs(back - plain).max() < 1e-5
