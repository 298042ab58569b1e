"""Gemma-2: norms that multiply with 1 + w before and after both halves of a block, logits kept in bounds."""

from __future__ import annotations

from dataclasses import replace

from edge_steer.checkpoint import Config
from edge_steer.converters.family import OTHER_WAY, Family, Keys, Shapes, dense_shapes
from edge_steer.converters.weights import Weight
from edge_steer.errors import FormatError, SteerError

# llama.cpp knows the one size of Gemma-2 whose attention is not scaled by the head width, by its number of blocks.
_LARGEST = 46


def sandwich_shapes(config: Config) -> Shapes:
    d = config.integer("hidden_size")
    return {**dense_shapes(config), "post_attention_norm": (d,), "post_ffw_norm": (d,)}


def one_plus(config: Config, name: str, weight: Weight) -> Weight:
    """GGUF holds 1 + w for every norm."""
    return replace(weight, offset=1.0) if name.endswith("norm.weight") else weight


def sliding(config: Config, every: int) -> Keys:
    """The window, and which blocks have it where they are not all but each `every`-th."""
    layers = config.integer("num_hidden_layers")
    usual = [(layer + 1) % every != 0 for layer in range(layers)]
    kinds = config.get("layer_types")
    slides = usual if kinds is None else [kind == "sliding_attention" for kind in kinds]
    if len(slides) != layers:
        raise FormatError(f"{config.path}: expected {layers} layer_types, got {len(slides)}")
    keys: Keys = {"attention.sliding_window": config.integer("sliding_window")}
    return keys if slides == usual else {**keys, "attention.sliding_window_pattern": slides}


def check_scale(config: Config, largest: int) -> None:
    """llama.cpp scales queries by the head width or, in the largest model, d/H; transformers by a value of its own."""
    layers, heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
    scale = config.integer("hidden_size") // heads if layers == largest else config.head_width
    if config.number("query_pre_attn_scalar") != scale:
        raise SteerError(
            f"{config.path}: expected query_pre_attn_scalar {scale}, got {config.get('query_pre_attn_scalar')}, "
            f"for which llama.cpp has no key; {OTHER_WAY}"
        )
    if config.get("use_bidirectional_attention"):
        raise SteerError(f"{config.path}: a model that attends in both directions cannot generate text; {OTHER_WAY}")


def _keys(config: Config) -> Keys:
    caps = {name: config.number(name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    return {**sliding(config, 2), **caps}


def _check(config: Config) -> None:
    check_scale(config, _LARGEST)
    if not config.get("attn_logit_softcapping") or not config.get("final_logit_softcapping"):
        raise SteerError(f"{config.path}: Gemma-2 without softcapping is not known here; {OTHER_WAY}")


GEMMA2 = Family(
    "gemma2", sandwich_shapes, _keys, form=one_plus, check=_check,
    defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    activation="gelu_pytorch_tanh", tied_only=True,
)  # fmt: skip
