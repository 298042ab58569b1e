"""Adapters steer unmodified llama.cpp, and PEFT transformers, as the hook does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from exports import ANGLES, TOKENS, assert_same, hook_logits, plain_logits, steering_for, tinies

from edge_steer.export.halves import core_at
from edge_steer.export.lora import export_adapter, export_pair, live_adapter, products, write_adapter
from edge_steer.export.lora_notes import scales
from edge_steer.export.peft import export_peft
from edge_steer.model_file import read_model

FAMILIES = ["gemma2", "gemma3", "llama", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3"]
__all__ = ["tinies"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pair_is_the_hook_at_any_angle(tinies: dict[str, Any], family: str, tmp_path: Path) -> None:
    gguf = tinies[family].gguf_path
    steering = steering_for(gguf)
    cos, sin, text = export_pair(gguf, tmp_path / "turn", steering)
    assert text.read_text().count("scale") > 3
    unsteered = plain_logits(gguf)
    for angle in ANGLES:
        c, s = scales(angle)
        assert_same(plain_logits(gguf, [(cos, c), (sin, s)]), hook_logits(gguf, [(steering, angle)]), unsteered)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_adapter_holds_several_steerings_at_their_dials(
    tinies: dict[str, Any], family: str, tmp_path: Path
) -> None:
    gguf = tinies[family].gguf_path
    actions = [
        (steering_for(gguf, name="a"), 30.0),
        (steering_for(gguf, "ablation", "attn_norm", seed=1, name="b"), 1.0),
        (steering_for(gguf, seed=2, name="c"), -75.0),
    ]
    adapter, ollama = export_adapter(gguf, tmp_path / "both.gguf", actions)
    assert_same(plain_logits(gguf, [(adapter, 1.0)]), hook_logits(gguf, actions), plain_logits(gguf))
    assert (tmp_path / ollama.read_text().splitlines()[0].removeprefix("FROM ")).resolve() == gguf.resolve()
    assert "ADAPTER ./both.gguf" in ollama.read_text()


@pytest.mark.parametrize("angle", ANGLES)
def test_one_adapter_is_the_hook_at_its_angle(tinies: dict[str, Any], angle: float, tmp_path: Path) -> None:
    gguf = tinies["qwen2_moe"].gguf_path
    steering = steering_for(gguf)
    adapter, _ = export_adapter(gguf, tmp_path / "one", [(steering, angle)])
    assert_same(plain_logits(gguf, [(adapter, 1.0)]), hook_logits(gguf, [(steering, angle)]), plain_logits(gguf))


def test_products_give_an_adapter_at_every_dial(tinies: dict[str, Any], tmp_path: Path) -> None:
    gguf = tinies["llama"].gguf_path
    steerings = [steering_for(gguf, name="a"), steering_for(gguf, "ablation", seed=1, name="b")]
    made = products(read_model(gguf), steerings)
    for dials in ((20.0, None), (None, 1.0), (-170.0, 1.0)):
        actions = [steering.action(dial) for steering, dial in zip(steerings, dials, strict=True)]
        path = tmp_path / "live.gguf"
        write_adapter(path, made, core_at(actions))
        hook = hook_logits(gguf, list(zip(steerings, dials, strict=True)))
        assert_same(plain_logits(gguf, [(path, 1.0)]), hook)


def test_a_live_adapter_goes_straight_to_the_loaded_model(tinies: dict[str, Any]) -> None:
    gguf = tinies["gemma3"].gguf_path
    steering = steering_for(gguf)
    made = products(read_model(gguf), [steering])
    llm = llama_cpp.Llama(str(gguf), n_ctx=128, verbose=False)
    adapter = live_adapter(llm._model.model, made, [steering.action(5.0)])
    assert adapter
    llama_cpp.llama_adapter_lora_free(adapter)


def test_an_adapter_is_for_scale_one_and_names_its_model(tinies: dict[str, Any], tmp_path: Path) -> None:
    from edge_steer.gguf_metadata import read_gguf

    gguf = tinies["mixtral"].gguf_path
    steering = steering_for(gguf, sites="ffn_norm")
    path, _ = export_adapter(gguf, tmp_path / "a", [(steering, 8)])
    found = read_gguf(path, lambda key: True)
    assert found.values["general.architecture"].value == "llama"
    assert found.values["general.type"].value == "adapter"
    assert found.values["adapter.type"].value == "lora"
    assert found.values["adapter.lora.alpha"].value == 0
    shapes = {tensor.name: tensor.shape for tensor in found.tensors}
    assert shapes["blk.1.ffn_up_exps.weight.lora_a"] == (64, 2, 4)
    assert shapes["blk.1.ffn_up_exps.weight.lora_b"] == (2, 128, 4)
    assert shapes["blk.1.ffn_gate_inp.weight.lora_b"] == (2, 4)
    assert not any("attn" in name or "down" in name for name in shapes)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3"])
def test_peft_on_transformers_is_the_hook(tinies: dict[str, Any], family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import tiny
    import torch
    import transformers

    model = tinies[family]
    one = steering_for(model.gguf_path, name="a")
    two = steering_for(model.gguf_path, "ablation", "ffn_norm", seed=1, name="b")
    for number, actions in enumerate(([(one, 8.0)], [(one, 90.0), (two, 1.0)])):
        out = export_peft(model.hf_dir, tmp_path / str(number), actions)
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 2 + number
        base = transformers.AutoModelForCausalLM.from_pretrained(model.hf_dir, dtype=torch.float32)
        modules = {name for name, _ in base.named_modules()}
        assert set(json.loads((out / "adapter_config.json").read_text())["target_modules"]) <= modules
        steered = peft.PeftModel.from_pretrained(base, out).eval()
        with torch.inference_mode():
            found = np.asarray(steered(torch.tensor([TOKENS])).logits[0].float())
        assert np.abs(found - tiny.torch_logits(model.hf_dir, TOKENS)).max() > 1e-2
        expected = hook_logits(model.gguf_path, actions)
        if family not in ("gemma2", "gemma3"):  # their GELU is a table in llama.cpp
            assert_same(found, expected)
        assert np.abs(found - expected).max() < 2e-2
