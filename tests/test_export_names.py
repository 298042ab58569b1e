"""The one table of Hugging Face names against gguf-py's own, which llama.cpp's converters use."""

from __future__ import annotations

import gguf
import pytest

from edge_steer.architectures import MODEL_TYPES, architecture, architecture_of
from edge_steer.errors import SteerError
from edge_steer.export.readers import _HF_MODULES, gguf_name

KNOWN = sorted(set(MODEL_TYPES.values()))
# What gguf-py takes only after its converters have stacked the experts.
STACKED = {"*": "0"}


@pytest.mark.parametrize("name", KNOWN)
def test_every_module_of_a_block_has_the_converters_name(name: str) -> None:
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    theirs = gguf.get_tensor_name_map(arch, 4)
    layers = architecture(name).layers
    checked = 0
    for ours, modules in _HF_MODULES.items():
        for module in modules:
            stacked = module.replace(".*.", ".")
            found = theirs.get_name(f"{layers}.2.{stacked}.weight", (".weight",))
            if found is not None:
                assert found == f"blk.2.{ours}.weight", module
                mine = gguf_name(architecture(name), f"{layers}.2.{module.replace('*', '17')}.weight")
                assert mine == f"blk.2.{ours}.weight"
                checked += 1
    assert checked >= 3


def test_names_outside_the_table() -> None:
    llama, gemma3, neox = (architecture(name) for name in ("llama", "gemma3", "gptneox"))
    assert gguf_name(llama, "model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name(llama, "lm_head.weight") == "output.weight"
    assert gguf_name(llama, "model.norm.weight") == "output_norm.weight"
    assert gguf_name(llama, "model.other.weight") is None
    assert gguf_name(llama, "model.layers.3.input_layernorm.weight") == "blk.3.attn_norm.weight"
    assert gguf_name(gemma3, "model.layers.3.pre_feedforward_layernorm.weight") == "blk.3.ffn_norm.weight"
    assert gguf_name(neox, "gpt_neox.final_layer_norm.bias") == "output_norm.bias"
    assert gguf_name(neox, "embed_out.weight") == "output.weight"
    assert gguf_name(llama, "model.layers.3.self_attn.q_proj.bias") == "blk.3.attn_q.bias"
    assert gguf_name(llama, "model.layers.3.self_attn.new_proj.weight") == "blk.3.self_attn.new_proj.weight"
    assert gguf_name(llama, "layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    assert gguf_name(llama, "model.layers.3.mlp.experts.gate_up_proj") == "blk.3.ffn_gate_up_exps.weight"
    assert gguf_name(llama, "model.layers.3.self_attn.rotary_emb.inv_freq") == "blk.3.self_attn.rotary_emb.inv_freq"
    for prefix in ("model.language_model.", "language_model.model."):
        assert gguf_name(gemma3, f"{prefix}layers.0.self_attn.k_proj.weight") == "blk.0.attn_k.weight"
    assert gguf_name(gemma3, "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight") is None
    assert gguf_name(neox, "gpt_neox.layers.1.attention.query_key_value.weight") == "blk.1.attn_qkv.weight"


@pytest.mark.parametrize(
    "second",
    ["blk.0.attn_norm_2.weight", "transformer.h.0.ln_attn.weight", "transformer.h.0.ln_attn"],
    ids=["GGUF", "checkpoint", "modules"],
)
def test_a_second_norm_tells_falcon_40b_from_falcon_7b(second: str) -> None:
    """They are of one name in GGUF and of one model_type."""
    small, large = (architecture_of({"model_type": "falcon"}, tensors) for tensors in ([], ["other", second]))
    assert small == architecture("falcon")
    assert large == architecture("falcon", [second])
    assert small.attention_norm == "attn_norm"
    assert large.attention_norm == "attn_norm_2"
    assert gguf_name(large, "transformer.h.3.ln_attn.weight") == "blk.3.attn_norm_2.weight"


def test_a_model_is_known_by_its_own_type_or_its_text_half_s() -> None:
    assert architecture_of({"model_type": "llava", "text_config": {"model_type": "llama"}}).name == "llama"
    for config in ({}, {"model_type": "mamba"}, {"model_type": None, "text_config": None}, {"model_type": ["llama"]}):
        with pytest.raises(SteerError, match=r"here: expected a model_type among .*llama.*, got"):
            architecture_of(config, where="here")
