"""Qwen2 and Qwen2.5, dense and with experts: biases on queries, keys and values, and heads as transformers has them."""

from __future__ import annotations

import numpy as np

from edge_steer.checkpoint import Config
from edge_steer.converters.family import OTHER_WAY, Family, Keys, Shapes, attention_shapes, dense_shapes
from edge_steer.converters.weights import Weight
from edge_steer.errors import SteerError


def _expert_keys(config: Config) -> Keys:
    return {
        "expert_count": config.integer("num_experts"),
        "expert_used_count": config.integer("num_experts_per_tok"),
        "expert_feed_forward_length": config.integer("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.integer("shared_expert_intermediate_size"),
    }


def _expert_shapes(config: Config) -> Shapes:
    d, experts = config.integer("hidden_size"), config.integer("num_experts")
    f, shared = config.integer("moe_intermediate_size"), config.integer("shared_expert_intermediate_size")
    return {
        **attention_shapes(config), "ffn_gate_inp": (experts, d),
        "ffn_gate_exps": (experts, f, d), "ffn_up_exps": (experts, f, d), "ffn_down_exps": (experts, d, f),
        "ffn_gate_inp_shexp": (d,),
        "ffn_gate_shexp": (shared, d), "ffn_up_shexp": (shared, d), "ffn_down_shexp": (d, shared),
    }  # fmt: skip


def _vector(config: Config, name: str, weight: Weight) -> Weight:
    """The shared expert's gate is a weight of one row, in GGUF a vector."""
    return weight.rearrange(np.ravel) if ".ffn_gate_inp_shexp." in name else weight


def _check(config: Config) -> None:
    """llama.cpp runs every block with experts and does not rescale the chosen ones' shares."""
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1 or config.get("norm_topk_prob"):
        raise SteerError(
            f"{config.path}: dense blocks among experts and norm_topk_prob are not known here; {OTHER_WAY}"
        )


_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
QWEN2 = Family("qwen2", dense_shapes, biases=("attn_q", "attn_k", "attn_v"), defaults=_DEFAULTS)
QWEN2_MOE = Family(
    "qwen2moe", _expert_shapes, _expert_keys, biases=("attn_q", "attn_k", "attn_v"), form=_vector, check=_check,
    defaults=_DEFAULTS,
)  # fmt: skip
