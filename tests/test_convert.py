"""Tiny directories of every family become GGUF files in which llama.cpp computes what transformers computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny  # noqa: E402
import torch  # noqa: E402
from directories import (  # noqa: E402
    TOKENS,
    assert_same_model,
    convert,
    divergence,
    edit,
    nothing_left,
    rewrite,
    tensors,
    values,
    variant,
)  # fmt: skip
from safetensors.torch import load_file, save_file  # noqa: E402

from edge_steer.errors import SteerError  # noqa: E402
from edge_steer.gguf_metadata import read_gguf  # noqa: E402
from edge_steer.model_file import read_model  # noqa: E402

ROPE = {"rope_theta": 1e4}


# --- the same model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_tensor_and_key_is_what_the_family_demands(
    models: Callable[[str], tiny.TinyModel], family: str, tmp_path: Path
) -> None:
    model, out = models(family), tmp_path / "out.gguf"
    convert(model.hf_dir, out, type="f32")
    expected, found = tensors(model.gguf_path), tensors(out)
    assert expected.keys() == found.keys()
    for name in expected:
        assert list(expected[name].shape) == list(found[name].shape)
        assert np.array_equal(expected[name].data, found[name].data), name
    theirs, ours = (read_gguf(path, lambda key: True).values for path in (model.gguf_path, out))
    for key in theirs.keys() - {"general.name", "tokenizer.ggml.token_type"}:
        assert str(theirs[key]) == str(ours[key]), key
    assert_same_model(model.hf_dir, out)
    assert nothing_left(tmp_path, "out.gguf")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "mixtral"])
def test_tied_embeddings_need_no_output_weight(
    models: Callable[[str], tiny.TinyModel], family: str, tmp_path: Path
) -> None:
    copy = variant(models(family).hf_dir, tmp_path / f"{family}-tied", tie_word_embeddings=True)
    rewrite(copy, lambda weights: weights.pop("lm_head.weight"))
    convert(copy, tmp_path / "out.gguf", type="f32")
    assert "output.weight" not in tensors(tmp_path / "out.gguf")
    assert_same_model(copy, tmp_path / "out.gguf")


def test_an_output_weight_is_left_out_only_where_it_is_the_embedding(
    models: Callable[[str], tiny.TinyModel], tmp_path: Path
) -> None:
    """What transformers does where config.json says tied and the checkpoint holds both."""
    copy = variant(models("llama").hf_dir, tmp_path / "tied", tie_word_embeddings=True)
    convert(copy, tmp_path / "differs.gguf", type="f32")
    assert_same_model(copy, tmp_path / "differs.gguf")
    rewrite(copy, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    convert(copy, tmp_path / "equal.gguf", type="f32")
    assert "output.weight" in tensors(tmp_path / "differs.gguf")
    assert "output.weight" not in tensors(tmp_path / "equal.gguf")


def test_gemma3_may_have_an_output_weight_of_its_own(models: Callable[[str], tiny.TinyModel], tmp_path: Path) -> None:
    copy = variant(models("gemma3").hf_dir, tmp_path / "untied", tie_word_embeddings=False)
    head = torch.randn(tiny.VOCABULARY, tiny.WIDTH, generator=torch.Generator().manual_seed(1)) / 4
    rewrite(copy, lambda weights: weights.update({"lm_head.weight": head}))
    convert(copy, tmp_path / "out.gguf", type="f32")
    assert_same_model(copy, tmp_path / "out.gguf")


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_a_checkpoint_in_shards_is_the_same_model(
    models: Callable[[str], tiny.TinyModel], family: str, tmp_path: Path
) -> None:
    model, copy = models(family), tmp_path / "sharded"
    shutil.copytree(model.hf_dir, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    transformers.AutoModelForCausalLM.from_pretrained(model.hf_dir).save_pretrained(copy, max_shard_size="100KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    convert(copy, tmp_path / "sharded.gguf", type="f32")
    convert(model.hf_dir, tmp_path / "whole.gguf", type="f32")
    whole, sharded = tensors(tmp_path / "whole.gguf"), tensors(tmp_path / "sharded.gguf")
    assert all(np.array_equal(whole[name].data, sharded[name].data) for name in whole)
    assert whole.keys() == sharded.keys()


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "short_factor": [1 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 256}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "linear", "factor": 2.0, **ROPE}),
        ("llama", {**LLAMA3, **ROPE}),
        ("qwen2", {**YARN, **ROPE}),
        ("qwen3", {**YARN, **ROPE, "attention_factor": 1.5, "beta_fast": 16.0}),
        ("gemma3", {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
    ids=["linear", "llama3", "yarn", "yarn with its own scale", "gemma3"],
)  # fmt: skip
def test_scaled_rotary_embeddings_are_the_same(
    models: Callable[[str], tiny.TinyModel], family: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    copy = variant(models(family).hf_dir, tmp_path / "scaled", rope_parameters=rope)
    convert(copy, tmp_path / "out.gguf", type="f32")
    assert_same_model(copy, tmp_path / "out.gguf")
    plain = tiny.torch_logits(models(family).hf_dir, TOKENS)
    assert divergence(plain, tiny.torch_logits(copy, TOKENS)) > 1e-3, "the scaling must matter"


@pytest.mark.parametrize(("count", "n_ctx"), [(60, 256), (300, 512)], ids=["short", "long"])
def test_phi3_s_two_sets_of_factors_are_the_same(
    models: Callable[[str], tiny.TinyModel], count: int, n_ctx: int, tmp_path: Path
) -> None:
    rope = {**LONG, **ROPE, "partial_rotary_factor": 1.0}
    copy = variant(models("phi3").hf_dir, tmp_path / "long", rope_parameters=rope, original_max_position_embeddings=256)
    convert(copy, tmp_path / "out.gguf", type="f32")
    assert_same_model(copy, tmp_path / "out.gguf", [256, *(i % 256 for i in range(count - 1))], n_ctx)


def test_configurations_of_older_releases_say_the_same(models: Callable[[str], tiny.TinyModel], tmp_path: Path) -> None:
    new = variant(models("llama").hf_dir, tmp_path / "tiny", rope_parameters={**LLAMA3, "rope_theta": 5e5})
    old = variant(models("llama").hf_dir, tmp_path / "older" / "tiny", rope_theta=5e5, rope_scaling=LLAMA3)
    edit(old / "config.json", lambda config: config.pop("rope_parameters"))
    gemma = models("gemma3").hf_dir
    older_gemma = variant(gemma, tmp_path / "older" / "gemma3", rope_theta=1e6, rope_local_base_freq=1e4)
    edit(older_gemma / "config.json", lambda config: config.pop("rope_parameters"))
    for one, other in ((new, old), (gemma, older_gemma)):
        convert(one, tmp_path / "one.gguf", force=True)
        convert(other, tmp_path / "other.gguf", force=True)
        assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_of_a_multimodal_gemma3_the_text_half_is_converted(
    models: Callable[[str], tiny.TinyModel], tmp_path: Path
) -> None:
    source, copy = models("gemma3").hf_dir, tmp_path / "gemma3"
    shutil.copytree(source, copy)
    text = json.loads((source / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    weights = {f"language_model.{name}": weight for name, weight in load_file(source / "model.safetensors").items()}
    weights |= {"vision_tower.embeddings.weight": torch.ones(3), "multi_modal_projector.norm.weight": torch.ones(3)}
    save_file(weights, copy / "model.safetensors")
    convert(copy, tmp_path / "half.gguf")
    convert(source, tmp_path / "text.gguf")
    assert (tmp_path / "half.gguf").read_bytes() == (tmp_path / "text.gguf").read_bytes()


# --- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "relative", "absolute"),
    [("f16", 2**-11, 1e-7), ("bf16", 2**-8, 0), ("q8_0", 0, 0.02), (None, 2**-11, 1e-7)],
)
def test_weights_are_rounded_once_and_vectors_not_at_all(
    models: Callable[[str], tiny.TinyModel], kind: str | None, relative: float, absolute: float, tmp_path: Path
) -> None:
    convert(models("mixtral").hf_dir, tmp_path / "out.gguf", type=kind)
    expected, found = tensors(models("mixtral").gguf_path), tensors(tmp_path / "out.gguf")
    for name, tensor in found.items():
        exact = len(tensor.shape) == 1 or "ffn_gate_inp" in name
        assert tensor.tensor_type.name == ("F32" if exact else (kind or "f16").upper())
        error = np.abs(values(tensor) - values(expected[name]))
        assert (error <= (0 if exact else np.abs(values(expected[name])) * relative + absolute)).all()
    file_type = {"f16": 1, "bf16": 32, "q8_0": 7, None: 1}[kind]
    assert read_model(tmp_path / "out.gguf").metadata["general.file_type"] == file_type
    assert_same_model(models("mixtral").hf_dir, tmp_path / "out.gguf", most=0.2)


def test_a_bfloat16_checkpoint_stays_one(models: Callable[[str], tiny.TinyModel], tmp_path: Path) -> None:
    copy = variant(models("gemma3").hf_dir, tmp_path / "brain", dtype="bfloat16")
    weights = {name: weight.bfloat16() for name, weight in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    convert(copy, tmp_path / "out.gguf")
    found = tensors(tmp_path / "out.gguf")
    assert found["token_embd.weight"].tensor_type.name == "BF16"
    pairs = {"blk.0.attn_q": "layers.0.self_attn.q_proj", "blk.0.attn_norm": "layers.0.input_layernorm"}
    for name, theirs in pairs.items():
        expected = weights[f"model.{theirs}.weight"].float().numpy() + ("norm" in name)
        assert np.array_equal(values(found[f"{name}.weight"]), expected)


def test_what_f16_cannot_hold_is_refused_with_the_tensor_s_name(
    models: Callable[[str], tiny.TinyModel], tmp_path: Path
) -> None:
    directory = variant(models("llama").hf_dir, tmp_path / "tiny-llama")

    def put(value: float) -> Callable[[dict[str, Any]], object]:
        return lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(value)

    rewrite(directory, put(7e4))
    with pytest.raises(SteerError, match=r"blk\.1\.ffn_up\.weight.*--type bf16"):
        convert(directory, tmp_path / "out.gguf", type="f16")
    convert(directory, tmp_path / "out.gguf", type="bf16")
    rewrite(directory, put(float("nan")))
    with pytest.raises(SteerError, match="NaN"):
        convert(directory, tmp_path / "other.gguf", type="f32")
    assert nothing_left(tmp_path, "out.gguf", "tiny-llama")
