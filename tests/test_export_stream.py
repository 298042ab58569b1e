"""Rotations of the residual stream, folded into weights in turned coordinates, are the hook's, exactly."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import TOKENS, assert_same, hook_logits, plain_logits, steering_for, tinies
from planted import random_steering

from edge_steer.architectures import architecture
from edge_steer.errors import SteerError
from edge_steer.export.baked import bake_gguf
from edge_steer.export.changes import Changes
from edge_steer.export.folding import folding
from edge_steer.export.hf import bake_hf
from edge_steer.export.lora import export_adapter, export_pair
from edge_steer.export.lora_notes import scales
from edge_steer.export.peft import export_peft
from edge_steer.model_file import read_model
from edge_steer.provenance import BaseModel
from edge_steer.rotation import TurnBy
from edge_steer.sites import Site
from edge_steer.steering import Steering

__all__ = ["tinies"]

FOLDABLE = ("llama", "qwen2", "qwen3", "phi3", "mixtral", "qwen2_moe")
D, LAYERS = 16, 6


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Llama whose head is its embedding."""
    pytest.importorskip("torch")
    import tiny

    llama = tiny.FAMILIES["llama"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            tiny.FAMILIES, "llama", dataclasses.replace(llama, config={**llama.config, "tie_word_embeddings": True})
        )
        return tiny.build("llama", tmp_path_factory.mktemp("tied"))


def torch_logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0].float().numpy())


@pytest.mark.parametrize("family", FOLDABLE)
def test_every_form_is_the_hook_with_a_plane_a_block(tinies: dict[str, Any], family: str, tmp_path: Path) -> None:
    model = tinies[family]
    on = [(steering_for(model.gguf_path, sites="layer_out"), 25.0)]
    expected, unsteered = hook_logits(model.gguf_path, on), plain_logits(model.gguf_path)
    baked = bake_gguf(model.gguf_path, tmp_path / "baked.gguf", on)
    assert not baked.untied
    assert_same(plain_logits(baked.path), expected, unsteered)
    adapter, _ = export_adapter(model.gguf_path, tmp_path / "one", on)
    assert_same(plain_logits(model.gguf_path, [(adapter, 1.0)]), expected, unsteered)
    assert_same(torch_logits(bake_hf(model.hf_dir, tmp_path / "hf", on).path), expected)
    if family not in ("mixtral", "qwen2_moe"):
        assert_same(torch_logits(model.hf_dir, export_peft(model.hf_dir, tmp_path / "peft", on)), expected)


@pytest.mark.parametrize("angle", [-170.0, 2.0, 90.0])
def test_one_plane_behind_every_block_is_of_rank_two(tinies: dict[str, Any], angle: float, tmp_path: Path) -> None:
    gguf = tinies["qwen2"].gguf_path
    on = [(steering_for(gguf, sites="layer_out", shared_plane=True), angle)]
    adapter, _ = export_adapter(gguf, tmp_path / "one", on)
    assert_same(plain_logits(gguf, [(adapter, 1.0)]), hook_logits(gguf, on), plain_logits(gguf))
    ranks = {tensor.shape[1] for tensor in read_adapter(adapter) if tensor.name.endswith("lora_a")}
    assert ranks == {2}


def read_adapter(path: Path) -> Any:
    from edge_steer.gguf_metadata import read_gguf

    return read_gguf(path, lambda key: False).tensors


def test_steerings_at_norms_and_in_the_stream_fold_together(tinies: dict[str, Any], tmp_path: Path) -> None:
    gguf = tinies["llama"].gguf_path
    on = [
        (steering_for(gguf, sites="norms", name="norms"), 20.0),
        (steering_for(gguf, sites="layer_out", seed=1, name="stream"), -15.0),
        (steering_for(gguf, "ablation", sites="attn_norm", seed=2, name="ablated"), 1.0),
        (steering_for(gguf, sites="layer_out", seed=3, name="again"), 40.0),
    ]
    expected = hook_logits(gguf, on)
    assert_same(plain_logits(bake_gguf(gguf, tmp_path / "baked.gguf", on).path), expected, plain_logits(gguf))
    adapter, _ = export_adapter(gguf, tmp_path / "one", on)
    assert_same(plain_logits(gguf, [(adapter, 1.0)]), expected)


def test_a_turn_behind_one_block_is_a_pair_at_every_angle(tinies: dict[str, Any], tmp_path: Path) -> None:
    gguf = tinies["llama"].gguf_path
    file = read_model(gguf)
    steering = random_steering(file.base, [Site(1, "layer_out")])
    cos, sin, _ = export_pair(gguf, tmp_path / "pair", steering)
    for angle in (-90.0, 8.0, 200.0):
        pair = list(zip((cos, sin), scales(angle), strict=True))
        assert_same(plain_logits(gguf, pair), hook_logits(gguf, [(steering, angle)]), plain_logits(gguf))
    with pytest.raises(SteerError, match="behind 2 blocks, one after another, which no pair gives at every angle"):
        export_pair(gguf, tmp_path / "no", steering_for(gguf, sites="layer_out"))


@pytest.mark.parametrize("sites", ["layer_out", "norms"])
def test_a_tied_head_becomes_a_weight_of_its_own(tied: Any, sites: str, tmp_path: Path) -> None:
    on = [(steering_for(tied.gguf_path, sites=sites), 25.0)]
    expected, unsteered = hook_logits(tied.gguf_path, on), plain_logits(tied.gguf_path)
    baked = bake_gguf(tied.gguf_path, tmp_path / "baked.gguf", on)
    assert baked.untied
    assert_same(plain_logits(baked.path), expected, unsteered)
    assert_same(torch_logits(bake_hf(tied.hf_dir, tmp_path / "hf", on).path), expected)
    assert_same(torch_logits(tied.hf_dir, export_peft(tied.hf_dir, tmp_path / "peft", on)), expected)
    with pytest.raises(SteerError, match=r"the head of this model is its embedding.*--to gguf"):
        export_adapter(tied.gguf_path, tmp_path / "one", on)


def test_norms_of_gemma_fold_up_to_the_head(tinies: dict[str, Any], tmp_path: Path) -> None:
    gguf = tinies["gemma3"].gguf_path
    on = [(steering_for(gguf, sites="norms"), 25.0)]
    baked = bake_gguf(gguf, tmp_path / "baked.gguf", on)
    assert baked.untied
    assert_same(plain_logits(baked.path), hook_logits(gguf, on), plain_logits(gguf))


def test_a_conversion_with_a_turned_stream_is_the_hook(tied: Any, tmp_path: Path) -> None:
    from directories import convert

    on = [(steering_for(tied.gguf_path, sites="layer_out"), 25.0)]
    convert(tied.hf_dir, tmp_path / "out.gguf", type="f32", steering=on)
    assert_same(plain_logits(tmp_path / "out.gguf"), hook_logits(tied.gguf_path, on), plain_logits(tied.gguf_path))


def test_what_cannot_be_folded_is_one_line(tinies: dict[str, Any], tmp_path: Path) -> None:
    gemma, llama = tinies["gemma3"].gguf_path, tinies["llama"].gguf_path
    with pytest.raises(SteerError, match=r"blk.1.layer_out: gemma3 normalises what a block writes .*attn_post_norm"):
        bake_gguf(gemma, tmp_path / "no.gguf", [(steering_for(gemma, sites="layer_out"), 8)])
    with pytest.raises(SteerError, match=r"blk.1.layer_out: ablation does not keep lengths"):
        bake_gguf(llama, tmp_path / "no.gguf", [(steering_for(llama, "ablation", sites="layer_out"), 1)])
    assert not list(tmp_path.iterdir())


# --- LayerNorms, in numpy ---------------------------------------------------------------------------------------------


def layer_norm_model() -> tuple[Steering, dict[str, np.ndarray]]:
    """Weights of Phi-2's form (one LayerNorm a block, biases everywhere), and a steering of its stream."""
    rng = np.random.default_rng(0)
    base = BaseModel("phi2", "m", LAYERS, D)
    steering = random_steering(base, [Site(layer, "layer_out") for layer in range(1, LAYERS)])
    basis = steering.basis.astype(np.float64)
    basis -= basis.mean(-1, keepdims=True)
    planes = np.stack([np.linalg.qr(plane.T)[0].T for plane in basis])
    tensors: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        for name in ("attn_qkv", "ffn_up", "attn_output", "ffn_down"):
            tensors[f"blk.{layer}.{name}.weight"] = rng.standard_normal((D, D)) / 4
            tensors[f"blk.{layer}.{name}.bias"] = rng.standard_normal(D) / 4
    for name in (*(f"blk.{layer}.attn_norm" for layer in range(LAYERS)), "output_norm"):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + rng.standard_normal(D) / 4, rng.standard_normal(D)
    tensors["output.weight"] = rng.standard_normal((D, D))
    return steering.with_(basis=planes), tensors


def run(tensors: dict[str, np.ndarray], h: np.ndarray, steering: Steering | None = None) -> np.ndarray:
    """The head's output for activations h (n, D); what attention does between tokens does not matter here."""

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True))
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    for layer in range(LAYERS):
        read = norm(f"blk.{layer}.attn_norm", h)
        attention = linear(f"blk.{layer}.attn_output", np.tanh(linear(f"blk.{layer}.attn_qkv", read)))
        h = h + attention + linear(f"blk.{layer}.ffn_down", np.tanh(linear(f"blk.{layer}.ffn_up", read)))
        site = Site(layer, "layer_out")
        if steering is not None and site in steering.steered:
            h = TurnBy(20.0)(h, steering.basis_at(site).astype(np.float64))
    return np.asarray(norm("output_norm", h) @ tensors["output.weight"].T)


def test_layer_norms_and_biases_fold_where_planes_are_orthogonal_to_ones() -> None:
    steering, tensors = layer_norm_model()
    folded = folding([steering], architecture("phi2"), tensors, lambda name: tensors[name])
    changes = Changes(folded, [TurnBy(20.0)], lambda name: tensors[name])
    baked = dict(tensors)
    for name in folded.parts:
        rows = np.atleast_2d(tensors[name]).astype(np.float32)
        parts = partial(iter, [rows[:5], rows[5:]])
        baked[name] = np.concatenate(list(changes.rows(name, parts))).reshape(tensors[name].shape)
    h = np.random.default_rng(1).standard_normal((7, D))
    expected = run(tensors, h, steering)
    assert np.abs(run(baked, h) - expected).max() < 2e-5
    assert np.abs(run(tensors, h) - expected).max() > 0.5
    tilted = steering.with_(basis=random_steering(steering.base, steering.sites).basis)
    with pytest.raises(SteerError, match="expected planes orthogonal to the all-ones vector, which phi2's LayerNorms"):
        folding([tilted], architecture("phi2"), tensors, lambda name: tensors[name])
