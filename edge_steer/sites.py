"""Sites: the places in a transformer block where an activation is read and turned.

A site is the output of a normalisation, scale included, or `layer_out`, the residual stream behind a block. llama.cpp
names it in the compute graph, Hugging Face has it as a module, and a known set of weights reads a normalisation's
output. This file is the one table of those names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from edge_steer.errors import SteerError, shown

# Kinds of site in the order in which a token meets them within one block.
KINDS = ("attn_norm", "attn_norm_2", "attn_post_norm", "ffn_norm", "ffn_post_norm", "layer_out", "output_norm")
PRE_KINDS = ("attn_norm", "attn_norm_2", "ffn_norm")
# Behind a block: the residual stream itself, and the norm between the last block and the head.
OUTER_KINDS = ("layer_out", "output_norm")


@dataclass(frozen=True)
class Site:
    """One site: `kind` (one of KINDS) in block `layer`, from 0. Written `blk.20.attn_norm`; sorts in network order.

    `output_norm`, the norm before the head, counts to the last block.
    """

    layer: int
    kind: str

    @property
    def name(self) -> str:
        return f"blk.{self.layer}.{self.kind}"

    def __str__(self) -> str:
        return self.name

    def __lt__(self, other: Site) -> bool:
        return (self.layer, KINDS.index(self.kind)) < (other.layer, KINDS.index(other.kind))

    @classmethod
    def parse(cls, name: str) -> Site:
        """The site called `name`. Raises SteerError for anything that is not `blk.N.KIND`."""
        match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.([a-z0-9_]+)", name)
        if match is None or match[2] not in KINDS:
            raise SteerError(f"expected a site like blk.20.attn_norm (kinds: {', '.join(KINDS)}), got {shown(name)}")
        return cls(int(match[1]), match[2])


@dataclass(frozen=True)
class SiteKind:
    """How one kind of site is named in one architecture.

    tensor:  llama.cpp graph node, without its `-{layer}`.
    module:  submodule of the Hugging Face layer; empty for the layer itself.
    readers: GGUF weights of the block that may read it (those that the file holds, do), of `output_norm` the head.
             Empty: none, it writes to the residual stream. None: not known, so nothing can be exported exactly.
    """

    tensor: str
    module: str
    readers: tuple[str, ...] | None


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`: its kinds of site, and where Hugging Face keeps the blocks and what is around them.

    final_norm, head, embedding: Hugging Face modules behind and before the blocks.
    layer_norm: its norms are LayerNorms, which first take the mean off; else RMSNorms.
    norm_plus_one: Hugging Face stores a norm's weight less 1 (a GGUF never does).
    tied_only: llama.cpp has no output weight of its own for it.
    """

    name: str
    kinds: dict[str, SiteKind]
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    embedding: str = "model.embed_tokens"
    layer_norm: bool = False
    norm_plus_one: bool = False
    tied_only: bool = False

    def kinds_for(self, choice: str) -> tuple[str, ...]:
        """Kinds meant by `--sites`: `pre` (before each half), `norms` (those and the one before the head), `all` (every
        norm of a block), or kinds by name; several with commas between."""
        pre = [kind for kind in PRE_KINDS if kind in self.kinds]
        inner = [kind for kind in self.kinds if kind not in OUTER_KINDS]
        known = {"pre": pre or inner, "norms": [*(pre or inner), "output_norm"], "all": inner}
        named = [kind.strip() for kind in choice.split(",")]
        wanted = [kind for name in named for kind in known.get(name, [name])]
        for kind in wanted:
            if kind not in self.kinds:
                names = ", ".join([*known, *self.kinds])
                raise SteerError(f"expected sites among {names} for architecture {self.name}, got {kind!r}")
        return tuple(kind for kind in KINDS if kind in wanted)

    def sites(self, block_count: int, choice: str = "pre") -> tuple[Site, ...]:
        """Every site of `choice` in a model of `block_count` blocks, in network order."""
        kinds = self.kinds_for(choice)
        # llama.cpp's control vectors, the form of `layer_out` that others run, know no block 0.
        first, last = {"layer_out": 1, "output_norm": block_count - 1}, block_count - 1
        return tuple(Site(layer, kind) for layer in range(last + 1) for kind in kinds if layer >= first.get(kind, 0))

    @property
    def post_norms(self) -> tuple[str, ...]:
        """Kinds of norms that a block applies to what it writes, before adding it to the residual stream."""
        return tuple(kind for kind in ("attn_post_norm", "ffn_post_norm") if kind in self.kinds)

    @property
    def attention_norm(self) -> str | None:
        """The kind of norm that attention reads, None where no norm before it is known."""
        return next((kind for kind in ("attn_norm_2", "attn_norm") if kind in self.kinds), None)

    def tensor(self, site: Site) -> str:
        """Name of the site's node in llama.cpp's graph, such as `attn_norm-20`; the last norm's has no number."""
        tensor = self.kinds[site.kind].tensor
        return tensor if site.kind == "output_norm" else f"{tensor}-{site.layer}"

    def module(self, site: Site) -> str:
        """Dotted path of the site's module in the Hugging Face model."""
        if site.kind == "output_norm":
            return self.final_norm
        return f"{self.layers}.{site.layer}.{self.kinds[site.kind].module}".rstrip(".")

    def readers(self, site: Site, tensors: Iterable[str]) -> tuple[str, ...]:
        """Names among `tensors` (of a GGUF) of the weights that read `site`.

        Raises SteerError where they cannot be known: a site that writes to the residual stream, an architecture
        without a table, a file that holds none of them.
        """
        suffixes = self.kinds[site.kind].readers
        if suffixes is None:
            raise SteerError(f"the weights that read {site} in architecture {self.name} are not known; use the hook")
        if not suffixes:
            raise SteerError(f"{site} writes to the residual stream, no single weight reads it; use the hook")
        if site.kind == "output_norm":
            return ("output.weight",)  # where the file has none, the embedding serves as one
        present = set(tensors)
        found = tuple(name for suffix in suffixes if (name := f"blk.{site.layer}.{suffix}.weight") in present)
        if not found:
            raise SteerError(f"expected one of {', '.join(suffixes)} in block {site.layer} to read {site}, found none")
        return found


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


def _falcon(two_norms: bool = False) -> Architecture:
    """Falcon-7B: one norm for both halves. Falcon-40B: `attn_norm_2`, from which its attention reads, beside it."""
    one = _one_norm(
        "falcon", layers="transformer.h", final_norm="transformer.ln_f", embedding="transformer.word_embeddings"
    )
    if not two_norms:
        return one
    kinds = {
        "attn_norm": SiteKind("attn_norm", "ln_mlp", _FEED_FORWARD),
        "attn_norm_2": SiteKind("attn_norm_2", "ln_attn", _ATTENTION),
        **_OUTER,
    }
    return replace(one, kinds=kinds)


_KNOWN = (
    *map(_pre_norm, ("llama", "mistral3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3", "smollm3", "olmoe")),
    replace(_pre_norm("gemma"), norm_plus_one=True, tied_only=True),
    *map(_sandwich_norm, ("gemma2", "gemma3")),
    _one_norm("phi2", final_norm="model.final_layernorm"),
    _one_norm("command-r", tied_only=True),
    _falcon(),
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
}  # fmt: skip


def architecture(name: str, tensors: Iterable[str] = ()) -> Architecture:
    """The architecture called `name` in GGUF; `tensors` of the file tell variants apart (Falcon-40B).

    Raises SteerError that lists the known ones.
    """
    if name == "falcon" and "blk.0.attn_norm_2.weight" in tensors:
        return _falcon(two_norms=True)
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise SteerError(f"the sites of architecture {shown(name)} are not known; known: {known}") from None


def site_of_module(architecture: Architecture, module: str, block_count: int | None = None) -> Site | None:
    """The site that the Hugging Face module called `module` is in `architecture`, None where it is none.

    block_count: of the model; without it the norm before the head is none.

    The language model of a multimodal one counts as the model: `model.language_model.layers.3.input_layernorm`.
    """
    plain = module.replace("language_model.", "")
    if plain == architecture.final_norm and block_count is not None:
        return Site(block_count - 1, "output_norm")
    match = re.fullmatch(rf"{re.escape(architecture.layers)}\.(0|[1-9][0-9]{{0,5}})(?:\.(.+))?", plain)
    if match is None:
        return None
    kinds = {kind.module: name for name, kind in architecture.kinds.items() if name != "output_norm"}
    kind = kinds.get(match[2] or "")
    return Site(int(match[1]), kind) if kind else None
