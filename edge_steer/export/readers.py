"""Which weights of a model read each steered site, and why a steering cannot be exported where they cannot be known.

A rotation h → Rh at a site is exact in the weights that read it, W → WR, if it reaches every one of them. Weights go
by their GGUF names; those of Hugging Face checkpoints are translated by the one table here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

from edge_steer.errors import MismatchError, NoEffectError, SteerError
from edge_steer.rotation import Action
from edge_steer.sites import OUTER_KINDS, Architecture, Site
from edge_steer.steering import Steering

Dialled = tuple[Steering, "float | None"]  # a steering and its dial; None is off

# GGUF weight → the Hugging Face modules it is made of, below the block; `*` is an expert's number.
_HF_MODULES = {
    "attn_q": ("self_attn.q_proj",),
    "attn_k": ("self_attn.k_proj",),
    "attn_v": ("self_attn.v_proj",),
    "attn_qkv": ("self_attn.qkv_proj", "self_attention.query_key_value", "attention.query_key_value"),
    "attn_output": ("self_attn.o_proj", "self_attn.dense", "self_attention.dense", "attention.dense"),
    "ffn_gate": ("mlp.gate_proj",),
    "ffn_up": ("mlp.up_proj", "mlp.gate_up_proj", "mlp.fc1", "mlp.dense_h_to_4h"),
    "ffn_down": ("mlp.down_proj", "mlp.fc2", "mlp.dense_4h_to_h"),
    "ffn_gate_inp": ("mlp.gate", "block_sparse_moe.gate"),
    "ffn_gate_exps": ("mlp.experts.*.gate_proj", "block_sparse_moe.experts.*.w1"),
    "ffn_up_exps": ("mlp.experts.*.up_proj", "block_sparse_moe.experts.*.w3"),
    "ffn_down_exps": ("mlp.experts.*.down_proj", "block_sparse_moe.experts.*.w2", "mlp.experts.down_proj"),
    "ffn_gate_up_exps": ("mlp.experts.gate_up_proj",),
    "ffn_gate_inp_shexp": ("mlp.shared_expert_gate",),
    "ffn_gate_shexp": ("mlp.shared_expert.gate_proj",),
    "ffn_up_shexp": ("mlp.shared_expert.up_proj",),
    "ffn_down_shexp": ("mlp.shared_expert.down_proj",),
}
# Around the blocks, by the architecture's own names for them.
_OUTER = {"output_norm": "final_norm", "output": "head", "token_embd": "embedding"}
_GGUF_NAMES = {module: name for name, modules in _HF_MODULES.items() for module in modules}
# Weights of a block that read something else than a steered site.
_OTHER_READERS = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
# A site that any of a group reads, all of it do.
_TOGETHER = (
    ("attn_q", "attn_k", "attn_v"),
    ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps"),
    ("ffn_gate_inp", "ffn_gate_up_exps"),
    ("ffn_gate_shexp", "ffn_up_shexp"),
)


def gguf_name(architecture: Architecture, tensor: str) -> str | None:
    """The GGUF name of what the Hugging Face tensor called `tensor` is part of; None for one that has no such name.

    A block's tensor that is not in the table keeps its own name behind `blk.N.`.
    """
    plain = re.sub(r"\blanguage_model\.", "", tensor)
    for name, module in _OUTER.items():
        outer = getattr(architecture, module)
        for ending in ("weight", "bias"):
            if plain in (f"{outer}.{ending}", f"{outer.removeprefix('model.')}.{ending}"):
                return f"{name}.{ending}"
    plain = plain if plain.startswith("model.") or not architecture.layers.startswith("model.") else f"model.{plain}"
    match = re.fullmatch(rf"{re.escape(architecture.layers)}\.(\d+)\.(.+)", plain)
    if match is None:
        return None
    module, dot, ending = match[2].rpartition(".")
    if match[2] in _GGUF_NAMES:  # the fused experts are parameters, not modules with a weight
        module, dot, ending = match[2], ".", "weight"
    known = _GGUF_NAMES.get(re.sub(r"(?<=\.experts\.)\d+(?=\.)", "*", module))
    norms = {how.module: kind for kind, how in architecture.kinds.items() if kind not in OUTER_KINDS}
    known = norms.get(module, known)
    return f"blk.{match[1]}.{known or module}{dot}{ending}"


def steered_readers(
    steerings: Sequence[Steering], architecture: Architecture, tensors: Collection[str]
) -> dict[str, Site]:
    """Every weight among `tensors` (GGUF names) that reads a norm which one of `steerings` turns, and that site.

    Raises SteerError, with the site's name, where the readers cannot all be known.
    """
    present = set(tensors)
    sites = sorted({site for steering in steerings for site in steering.steered if site.kind != "layer_out"})
    found: dict[str, Site] = {}
    for site in sites:
        for name in readers_of(site, architecture, present):
            found[name] = site
    return found


def readers_of(site: Site, architecture: Architecture, tensors: set[str]) -> tuple[str, ...]:
    """Every weight among `tensors` that reads the norm `site`. Raises SteerError if they cannot all be known."""
    if site.kind not in architecture.kinds:
        raise MismatchError(f"expected a site of {', '.join(architecture.kinds)} in {architecture.name}, got {site}")
    found = architecture.readers(site, tensors)
    if site.kind == "output_norm":
        return found
    names = {_suffix(name) for name in found}
    suffixes = architecture.kinds[site.kind].readers or ()
    for group in _TOGETHER:
        # The router alone does not say which of the two forms the experts are in.
        if names & (set(group) - {"ffn_gate_inp"}) and (missing := [each for each in group if each not in names]):
            raise SteerError(f"{site} is read by {', '.join(sorted(names))}, but the model's {missing[0]} is missing")
    for half, heads in (("attention", "attn_"), ("feed-forward network", "ffn_")):
        readers = {name for name in names if name.startswith(heads)} - {"ffn_gate_inp", "ffn_gate"}
        if not readers and any(suffix.startswith(heads) for suffix in suffixes):
            raise SteerError(f"{site} is read by the block's {half}, but no weight of it is known; use the hook")
    known = {reader for kind in architecture.kinds.values() for reader in kind.readers or ()} | set(_OTHER_READERS)
    for name in sorted(tensors):
        if name.startswith(f"blk.{site.layer}.") and name.endswith(".weight") and "norm" not in name:
            suffix = _suffix(name)
            if suffix not in known and not suffix.startswith("ln_"):
                raise SteerError(f"whether {name} reads {site} is not known, so nothing is exported; use the hook")
    return found


def _suffix(name: str) -> str:
    return name.split(".", 2)[2].removesuffix(".weight")


def check_experts(numbers: Collection[tuple[str, int]], expected: int) -> None:
    """Raise SteerError where a weight, given as (GGUF name, experts it holds), has not the `expected` number."""
    for name, count in numbers:
        if count != expected:
            raise SteerError(
                f"expected {expected} experts in {name}, found {count}; a part of the experts is not exported"
            )


def linear_actions(steerings: Sequence[Dialled]) -> tuple[list[Steering], list[Action]]:
    """The steerings that act at their dials, and what they do.

    Raises SteerError for an operator that no weight can hold, NoEffectError where all are off.
    """
    on: list[Steering] = []
    actions: list[Action] = []
    for steering, dial in steerings:
        check_linear(steering)
        if (action := steering.action(dial)) is not None:
            on.append(steering)
            actions.append(action)
    if not on:
        raise NoEffectError("every steering is off; give an angle: -s FILE:8 or --angle 8")
    names = Counter(steering.name for steering in on)
    if len(names) != len(on):
        raise SteerError(f"two steerings are called {names.most_common(1)[0][0]!r}; calibrate one with another --name")
    return on, actions


def check_linear(steering: Steering) -> None:
    """Raise SteerError where the steering's operator is not linear, with the reason."""
    if steering.operator not in ("selective", "ablation"):
        why = "adds a constant, which a weight without a bias cannot hold" if steering.operator == "addition" else (
            "turns to an angle, which depends on the activation and is not linear"
        )  # fmt: skip
        cure = "; use --to control-vector or the hook" if steering.operator == "addition" else "; use the hook"
        raise SteerError(f"steering {steering.name!r} at {steering.steered[0]}: {steering.operator} {why}{cure}")
