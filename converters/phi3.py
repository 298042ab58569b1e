"""Phi-3, Phi-3.5, Phi-4-mini: queries, keys and values in one weight, gate and up in another, in llama.cpp too."""

from __future__ import annotations

from edge_steer.checkpoint import Config
from edge_steer.converters.family import Family, Shapes, attention_shapes


def _shapes(config: Config) -> Shapes:
    d, f = config.integer("hidden_size"), config.integer("intermediate_size")
    shapes = attention_shapes(config)
    fused = sum(shapes.pop(name)[0] for name in ("attn_q", "attn_k", "attn_v"))
    return {**shapes, "attn_qkv": (fused, d), "ffn_up": (2 * f, d), "ffn_down": (d, f)}


PHI3 = Family(
    "phi3", _shapes,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False},
)  # fmt: skip
