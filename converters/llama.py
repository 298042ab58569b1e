"""Llama, and what is built like it: SmolLM2, Mistral, Mixtral."""

from __future__ import annotations

from edge_steer.checkpoint import Config
from edge_steer.converters.family import Family, Keys, Shapes, attention_shapes, dense_shapes, neighbours
from edge_steer.converters.weights import Weight

_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def _form(config: Config, name: str, weight: Weight) -> Weight:
    """llama.cpp turns neighbouring elements of a head's queries and keys in this architecture."""
    heads = config.integer("num_attention_heads")
    if ".attn_q." in name:
        return neighbours(name, weight, heads)
    if ".attn_k." in name:
        return neighbours(name, weight, config.integer("num_key_value_heads", heads))
    return weight


def _expert_keys(config: Config) -> Keys:
    return {
        "expert_count": config.integer("num_local_experts"),
        "expert_used_count": config.integer("num_experts_per_tok"),
    }


def _expert_shapes(config: Config) -> Shapes:
    d, f, experts = (config.integer(key) for key in ("hidden_size", "intermediate_size", "num_local_experts"))
    return {
        **attention_shapes(config), "ffn_gate_inp": (experts, d),
        "ffn_gate_exps": (experts, f, d), "ffn_up_exps": (experts, f, d), "ffn_down_exps": (experts, d, f),
    }  # fmt: skip


LLAMA = Family(
    "llama", dense_shapes, biases=_BIASES, form=_form,
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False},
)  # fmt: skip
MISTRAL = Family(
    "llama", dense_shapes, form=_form,
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
)  # fmt: skip
MIXTRAL = Family(
    "llama", _expert_shapes, _expert_keys, form=_form,
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "tie_word_embeddings": False, "rope_theta": 1e6,
    },
)  # fmt: skip
