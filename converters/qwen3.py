"""Qwen3: Qwen2 with norms on queries and keys instead of biases, and a head width of its own."""

from __future__ import annotations

from edge_steer.checkpoint import Config
from edge_steer.converters.family import Family, Shapes, dense_shapes


def _shapes(config: Config) -> Shapes:
    w = config.head_width
    return {**dense_shapes(config), "attn_q_norm": (w,), "attn_k_norm": (w,)}


QWEN3 = Family(
    "qwen3", _shapes,
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128, "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
)  # fmt: skip
