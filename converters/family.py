"""What a family file states, and what all families share: sizes, rotary embeddings, forms of weights.

Letters: d model width, H query heads, K key/value heads, w head width, f feed-forward width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.checkpoint import Config, positive
from edge_steer.converters.weights import Weight
from edge_steer.errors import FormatError, SteerError, quote

Keys = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
Array = NDArray[np.float32]


def _unchanged(config: Config, name: str, weight: Weight) -> Weight:
    return weight


def _no_keys(config: Config) -> Keys:
    return {}


def _nothing(config: Config) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """One family of models in one GGUF architecture.

    shapes:     weights of every block with their shapes (numpy order), all of them required.
    keys:       GGUF keys beyond the common ones, without `{arch}.`.
    biases:     weights that may have a bias.
    form:       a weight, by its GGUF name, in the form that llama.cpp computes with.
    check:      raises SteerError for what llama.cpp would compute otherwise than transformers.
    defaults:   values of keys that config.json may lack, as transformers has them.
    tied_only:  llama.cpp has no output weight for it.
    """

    arch: str
    shapes: Callable[[Config], Shapes]
    keys: Callable[[Config], Keys] = _no_keys
    biases: tuple[str, ...] = ()
    form: Callable[[Config, str, Weight], Weight] = _unchanged
    check: Callable[[Config], None] = _nothing
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "silu"
    tied_only: bool = False


def common_keys(config: Config) -> Keys:
    """Sizes that every family has."""
    return {
        "context_length": config.integer("max_position_embeddings"),
        "embedding_length": config.integer("hidden_size"),
        "block_count": config.integer("num_hidden_layers"),
        "feed_forward_length": config.integer("intermediate_size"),
        "attention.head_count": config.integer("num_attention_heads"),
        "attention.head_count_kv": config.integer("num_key_value_heads", config.integer("num_attention_heads")),
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps"),
    }


def attention_shapes(config: Config) -> Shapes:
    """Norms around attention and feed-forward network, and the four attention weights."""
    d, w, heads = config.integer("hidden_size"), config.head_width, config.integer("num_attention_heads")
    key_value = config.integer("num_key_value_heads", heads) * w
    return {
        "attn_norm": (d,), "attn_q": (heads * w, d), "attn_k": (key_value, d), "attn_v": (key_value, d),
        "attn_output": (d, heads * w), "ffn_norm": (d,),
    }  # fmt: skip


def dense_shapes(config: Config) -> Shapes:
    """A block of attention and a gated feed-forward network."""
    d, f = config.integer("hidden_size"), config.integer("intermediate_size")
    return {**attention_shapes(config), "ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f)}


def neighbours(name: str, weight: Weight, heads: int) -> Weight:
    """Each head's rows so that two that turn together are neighbours; transformers has them half a head apart."""

    if not weight.size or not weight.shape or weight.shape[0] % (2 * heads):
        raise FormatError(f"expected {name} as the rows of {heads} heads of an even width, got shape {weight.shape}")

    def order(part: NDArray[Any]) -> NDArray[Any]:
        ordered: NDArray[Any] = part.reshape(heads, 2, -1, *part.shape[1:]).swapaxes(1, 2).reshape(part.shape)
        return ordered

    return weight.rearrange(order)


def note_window(config: Config) -> str | None:
    """What to tell of a model with a sliding window in an architecture that llama.cpp runs without."""
    window = config.get("sliding_window")
    if (
        not window
        or config.get("use_sliding_window", True) is False
        or window >= config.integer("max_position_embeddings")
    ):
        return None
    return f"llama.cpp runs this family without its sliding window: past {window} tokens its answers are others"


# --- rotary embeddings ----------------------------------------------------------------------------------------------


def rope_parameters(config: Config, kind: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters of layers of `kind`, from `rope_parameters` (transformers 5) or what came before it."""
    given = config.mapping("rope_parameters")
    own = given.get(kind, given)
    if not isinstance(own, dict):
        raise FormatError(f"{config.path}: expected an object as rope_parameters.{kind}, got {quote(own)}")
    found = {**config.mapping("rope_scaling"), **own}
    kept = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")}
    merged = {**{key: value for key, value in kept.items() if value is not None}, **found}
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    return merged


def rope_width(config: Config) -> int:
    """How many of a head's elements are turned."""
    return int(config.head_width * float(rope_parameters(config).get("partial_rotary_factor") or 1.0))


def rope(config: Config) -> tuple[Keys, dict[str, Array]]:
    """GGUF keys and tensors for the rotary embeddings. Raises SteerError for a scaling that has no form there."""
    given = rope_parameters(config)
    kind = given["rope_type"]

    def number(key: str, default: Any = None) -> float:
        return positive(config.path, f"rope {key}", given.get(key) if given.get(key) is not None else default)

    base = number("rope_theta", 10000.0)
    keys: Keys = {"rope.freq_base": base, "rope.dimension_count": rope_width(config)}
    if kind == "default":
        return keys, {}
    if kind == "linear":
        return {**keys, "rope.scaling.type": "linear", "rope.scaling.factor": number("factor")}, {}
    trained = int(number("original_max_position_embeddings", config.integer("max_position_embeddings")))
    if kind == "llama3":
        factors = _llama3_factors(
            base, rope_width(config), trained, number("factor"), number("low_freq_factor"), number("high_freq_factor")
        )
        return keys, {"rope_freqs.weight": factors}
    if kind == "yarn":
        return {**keys, **_yarn_keys(config, given, number, trained)}, {}
    if kind in ("longrope", "su"):
        factor = number("factor", config.integer("max_position_embeddings") / trained)
        own = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        keys |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": trained,
            "rope.scaling.attn_factor": number("attention_factor", own),
        }
        return keys, {
            f"rope_factors_{which}.weight": _read_factors(config, given, which) for which in ("long", "short")
        }
    raise SteerError(f"{config.path}: rotary scaling {quote(kind)} is not known here; {OTHER_WAY}")


def _yarn_keys(config: Config, given: Mapping[str, Any], number: Callable[..., float], trained: int) -> Keys:
    factor = number("factor")
    own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0  # what llama.cpp scales attention by
    scaled = given.get("attention_factor")
    if scaled is None and given.get("mscale") and given.get("mscale_all_dim"):
        raise SteerError(f"{config.path}: yarn with mscale is not known here; {OTHER_WAY}")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": trained,
        "rope.scaling.attn_factor": (own if scaled is None else float(scaled)) / own,
        "rope.scaling.yarn_beta_fast": number("beta_fast", 32.0),
        "rope.scaling.yarn_beta_slow": number("beta_slow", 1.0),
    }


OTHER_WAY = (
    "for other models write a steered directory with `edge-steer export --to hf` and convert it with llama.cpp's own "
    "convert_hf_to_gguf.py"
)


def _read_factors(config: Config, given: Mapping[str, Any], which: str) -> Array:
    values, width = given.get(f"{which}_factor"), rope_width(config) // 2
    if not isinstance(values, list) or len(values) != width:
        raise FormatError(f"{config.path}: expected {width} numbers as rope {which}_factor, got {values!r:.60}")
    return np.array([positive(config.path, f"rope {which}_factor", value) for value in values], np.float32)


def _llama3_factors(base: float, width: int, trained: int, factor: float, low: float, high: float) -> Array:
    """What each frequency is divided by: 1 for waves that fit the trained context often, `factor` for long ones."""
    waves = 2 * np.pi * base ** (np.arange(0, width, 2, dtype=np.float64) / width)
    share = np.clip((trained / waves - low) / (high - low), 0, 1)  # of the unscaled frequency
    return (1 / ((1 - share) / factor + share)).astype(np.float32)
