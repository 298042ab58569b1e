"""The architectures that can be steered: how llama.cpp and Hugging Face name each one's sites, and which weights read
them. This file is the one table of those names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from edge_steer.errors import SteerError, quote
from edge_steer.sites import Architecture, SiteKind

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_FEED_FORWARD = (
    "ffn_gate", "ffn_up",
    "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps",
    "ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp",
)  # fmt: skip
_OUTER = {"layer_out": SiteKind("l_out", "", ()), "output_norm": SiteKind("result_norm", "", ("output",))}
_OUTER_UNKNOWN = {**_OUTER, "output_norm": SiteKind("result_norm", "", None)}


def _pre_norm(name: str, *, known: bool = True) -> Architecture:
    """Norm before attention and before the feed-forward network: Llama, Mistral, Qwen, Phi-3 and most others."""
    return Architecture(
        name,
        {
            "attn_norm": SiteKind("attn_norm", "input_layernorm", _ATTENTION if known else None),
            "ffn_norm": SiteKind("ffn_norm", "post_attention_layernorm", _FEED_FORWARD if known else None),
            **(_OUTER if known else _OUTER_UNKNOWN),
        },
    )


def _sandwich_norm(name: str, *, known: bool = True) -> Architecture:
    """Norms before and after both halves: Gemma-2, Gemma-3."""
    return Architecture(
        name,
        {
            "attn_norm": SiteKind("attn_norm", "input_layernorm", _ATTENTION if known else None),
            "attn_post_norm": SiteKind("attn_post_norm", "post_attention_layernorm", ()),
            "ffn_norm": SiteKind("ffn_norm", "pre_feedforward_layernorm", _FEED_FORWARD if known else None),
            "ffn_post_norm": SiteKind("ffn_post_norm", "post_feedforward_layernorm", ()),
            **(_OUTER if known else _OUTER_UNKNOWN),
        },
    )


def _one_norm(name: str, module: str = "input_layernorm", **more: Any) -> Architecture:
    """One norm that both halves read: Phi-2, Command-R, Falcon-7B."""
    kinds = {"attn_norm": SiteKind("attn_norm", module, _ATTENTION + _FEED_FORWARD), **_OUTER}
    return Architecture(name, kinds, layer_norm=True, **more)


def _gpt_neox() -> Architecture:
    return replace(
        _pre_norm("gptneox"), layers="gpt_neox.layers", final_norm="gpt_neox.final_layer_norm", head="embed_out",
        embedding="gpt_neox.embed_in", layer_norm=True,
    )  # fmt: skip


_FALCON_7B = _one_norm(
    "falcon", layers="transformer.h", final_norm="transformer.ln_f", embedding="transformer.word_embeddings"
)
# Of the same name in GGUF and in Hugging Face, with a norm of its own for each half; the second one tells them apart.
_FALCON_40B = replace(
    _FALCON_7B,
    kinds={
        "attn_norm": SiteKind("attn_norm", "ln_mlp", _FEED_FORWARD),
        "attn_norm_2": SiteKind("attn_norm_2", "ln_attn", _ATTENTION),
        **_OUTER,
    },
)
_FALCON_40B_NORM = re.compile(r"\.0\.(attn_norm_2|ln_attn)\b")


_KNOWN = (
    *map(_pre_norm, ("llama", "mistral3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3", "smollm3", "olmoe")),
    replace(_pre_norm("gemma"), norm_plus_one=True, tied_only=True),
    *map(_sandwich_norm, ("gemma2", "gemma3")),
    _one_norm("phi2", final_norm="model.final_layernorm"),
    _one_norm("command-r", tied_only=True),
    _FALCON_7B,
    _gpt_neox(),
)
# Node names read off llama.cpp's model sources; which weights read them was not checked, so these only run live.
_HOOK_ONLY_PRE_NORM = (
    "apertus", "arcee", "baichuan", "bailingmoe", "bailingmoe2", "chatglm", "codeshell", "deci", "deepseek",
    "deepseek2",
    "dots1", "ernie4_5", "ernie4_5-moe", "exaone", "exaone-moe", "glm4", "gpt2", "granite", "granitemoe", "grovemoe",
    "hunyuan-moe", "internlm2", "jais", "jais2", "llama4", "maincoder", "minicpm", "minicpm3", "minimax-m2", "mpt",
    "nemotron", "olmo", "openelm", "orion", "pangu-embedded", "qwen", "refact", "smallthinker", "stablelm", "starcoder",
    "starcoder2", "xverse",
)  # fmt: skip
_HOOK_ONLY_SANDWICH_NORM = ("afmoe", "gemma3n", "gemma4")

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        *_KNOWN,
        *(_pre_norm(name, known=False) for name in _HOOK_ONLY_PRE_NORM),
        *(_sandwich_norm(name, known=False) for name in _HOOK_ONLY_SANDWICH_NORM),
    )
}

# Hugging Face `model_type` → GGUF `general.architecture`.
MODEL_TYPES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "smollm3": "smollm3",
    "qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3",
    "phi3": "phi3", "phi": "phi2", "cohere": "command-r", "falcon": "falcon", "gpt_neox": "gptneox",
    "olmoe": "olmoe",
}  # fmt: skip


def architecture(name: str, tensors: Iterable[str] = ()) -> Architecture:
    """The architecture called `name` in GGUF; the names of its `tensors` or modules tell variants apart.

    Raises SteerError that lists the known ones.
    """
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise SteerError(f"the sites of architecture {quote(name)} are not known; known: {known}")
    if name == _FALCON_40B.name and any(_FALCON_40B_NORM.search(tensor) for tensor in tensors):
        return _FALCON_40B
    return ARCHITECTURES[name]


def architecture_of(
    config: Mapping[str, Any], tensors: Iterable[str] = (), *, where: object = "config.json"
) -> Architecture:
    """The architecture of the model with the Hugging Face configuration `config`, or of the text half of it.

    tensors: names of its tensors or modules. Raises SteerError, naming `where` it stands, for a family not known.
    """
    text = config.get("text_config")
    named = [config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]
    known = next((MODEL_TYPES[each] for each in named if isinstance(each, str) and each in MODEL_TYPES), None)
    if known is None:
        raise SteerError(
            f"{where}: expected a model_type among {', '.join(sorted(MODEL_TYPES))}, got {quote(named[0])}; "
            "use a GGUF of the model instead"
        )
    return architecture(known, tensors)
