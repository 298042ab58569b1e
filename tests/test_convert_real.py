"""Published models, read back from GGUF by transformers and converted anew, are the models that they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from directories import (  # noqa: E402
    convert,
    directory_of,
    divergence,
    llama_logits,
    open_llama,
    tensors,
    values,
)

from edge_steer.converters.same_tokens import TEXT  # noqa: E402
from edge_steer.gguf_metadata import read_gguf  # noqa: E402
from edge_steer.preset import neutral_passages  # noqa: E402

WINDOW = 128  # so that a vocabulary's logits fit into memory
VOCABULARY = ("model", "tokens", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")


def metadata(gguf: Path) -> dict[str, Any]:
    return {key: value.value for key, value in read_gguf(gguf, lambda key: True).values.items()}


def kl_to_transformers(directory: Path, gguf: Path, count: int) -> float:
    """Mean KL over `count` tokens of prose, code and many scripts, in windows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    text = "\n".join((*neutral_passages(), *TEXT))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = (tokens * (count // len(tokens) + 1))[:count]
    llama, found = open_llama(gguf, WINDOW), []
    for start in range(0, count, WINDOW):
        window = tokens[start : start + WINDOW]
        with torch.inference_mode():
            expected = model(torch.tensor([window])).logits[0].numpy()
        found.append(divergence(expected, llama_logits(llama, window)) * len(window))
    return sum(found) / count


@pytest.mark.slow
def test_smollm2_comes_back_as_it_was(smollm2: Path, tmp_path: Path) -> None:
    directory, out = directory_of(smollm2, tmp_path / "smollm2", "float32"), tmp_path / "out.gguf"
    with pytest.warns(UserWarning, match="does not split text as smollm"):  # transformers loses the digits' splitting
        convert(directory, out, type="f16", pre="smollm")
    before, after = metadata(smollm2), metadata(out)
    for name in (*VOCABULARY, "merges", "pre"):
        assert np.array_equal(before[f"tokenizer.ggml.{name}"], after[f"tokenizer.ggml.{name}"]), name
    assert before["tokenizer.chat_template"] == after["tokenizer.chat_template"]
    old, new = tensors(smollm2), tensors(out)
    assert old.keys() == new.keys()
    for name in old:
        expected = values(old[name])
        rounded = expected if expected.ndim == 1 else expected.astype(np.float16).astype(np.float32)
        assert np.array_equal(values(new[name]), rounded), name
    kl = kl_to_transformers(directory, out, 2048)
    print(f"SmolLM2 as F16 against transformers: mean KL {kl:.1e} over 2,048 tokens")
    assert kl <= 1e-3


@pytest.mark.slow
def test_gemma3_comes_back_as_it_was(gemma3: Path, tmp_path: Path) -> None:
    directory, out = directory_of(gemma3, tmp_path / "gemma3", "bfloat16"), tmp_path / "out.gguf"
    convert(directory, out)
    before, after = metadata(gemma3), metadata(out)
    for name in (*VOCABULARY, "pre", "add_bos_token", "add_eos_token", "add_space_prefix"):
        assert np.array_equal(before[f"tokenizer.ggml.{name}"], after[f"tokenizer.ggml.{name}"]), name
    normal = np.asarray(before["tokenizer.ggml.token_type"]) == 1
    orders = [np.argsort(-np.asarray(each["tokenizer.ggml.scores"])[normal], kind="stable") for each in (before, after)]
    assert np.array_equal(*orders), "what merges first"
    old, new = tensors(gemma3), tensors(out)
    assert old.keys() == new.keys()
    for name in old:
        expected, found = values(old[name]), values(new[name])
        stored = expected - 1 if "norm" in name else expected  # the checkpoint holds w of 1 + w
        assert (np.abs(found - expected) <= np.abs(stored) * 2**-8 + 1e-6).all(), name
    convert(directory, out, type="f16", force=True)
    kl = kl_to_transformers(directory, out, 2048)
    print(f"Gemma-3 as F16 against transformers: mean KL {kl:.1e} over 2,048 tokens")
    assert kl <= 1e-3
