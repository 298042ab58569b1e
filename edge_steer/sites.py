"""Sites: the places in a transformer block where an activation is read and turned.

A site is the output of a normalisation, scale included, or `layer_out`, the residual stream behind a block. llama.cpp
names it in the compute graph, Hugging Face has it as a module, and a known set of weights reads a normalisation's
output. `architectures.py` is the table of those names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from edge_steer.errors import SteerError, quote

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
            raise SteerError(f"expected a site like blk.20.attn_norm (kinds: {', '.join(KINDS)}), got {quote(name)}")
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

        Raises SteerError if they cannot be known: a site that writes to the residual stream, an architecture
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
