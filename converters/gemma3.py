"""Gemma-3, its text half: Gemma-2 with norms on queries and keys instead of bounds, and two rotary bases."""

from __future__ import annotations

from edge_steer.checkpoint import Config, positive
from edge_steer.converters.family import OTHER_WAY, Family, Keys, Shapes, rope_parameters
from edge_steer.converters.gemma2 import check_scale, one_plus, sandwich_shapes, sliding
from edge_steer.errors import SteerError

_LARGEST = 62  # blocks of the one size whose attention llama.cpp does not scale by the head width


def _shapes(config: Config) -> Shapes:
    w = config.head_width
    return {**sandwich_shapes(config), "attn_q_norm": (w,), "attn_k_norm": (w,)}


def _local_base(config: Config) -> float:
    """Rotary base of the sliding blocks, where transformers 5 keeps it or where older files do."""
    local = config.mapping("rope_parameters").get("sliding_attention") or {}
    return positive(
        config.path, "rope base of sliding layers", local.get("rope_theta", config.get("rope_local_base_freq"))
    )


def _keys(config: Config) -> Keys:
    keys: Keys = {
        **sliding(config, config.integer("sliding_window_pattern")),
        "rope.freq_base_swa": _local_base(config),
    }
    cap = config.get("final_logit_softcapping")
    return {**keys, "final_logit_softcapping": float(cap)} if cap else keys


def _check(config: Config) -> None:
    check_scale(config, _LARGEST)
    local = config.mapping("rope_parameters").get("sliding_attention") or {}
    if config.get("attn_logit_softcapping") or local.get("rope_type", "default") != "default":
        raise SteerError(f"{config.path}: bounded attention or scaled sliding layers are not known here; {OTHER_WAY}")
    rope_parameters(config)


GEMMA3 = Family(
    "gemma3", _shapes, _keys, form=one_plus, check=_check,
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "sliding_window_pattern": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "tie_word_embeddings": True,
    },
    activation="gelu_pytorch_tanh",
)  # fmt: skip
