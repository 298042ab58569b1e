"""Which tensors of a model change when steerings are folded into it, and how.

At a norm, W R h = (W R) h: the weights that read it take the rotation. In the residual stream nothing reads a rotation
R_l behind block l directly, so the stream itself is written in turned coordinates, the invariance that QuaRot
(arXiv 2404.00456) and SliceGPT (arXiv 2401.15024) use: with T_l = R_l … R_1 the steered stream is y = T z, and the file
computes z. An RMSNorm with weight g does not see the length-keeping T, diag(g) norm(T z) = diag(g) T norm(z), so

    what reads a norm        W → W diag(g) T diag(1/g′)     g′ takes the place of g, the same in an adapter
    what writes a block      W → Tᵀ W, b → Tᵀ b
    the head                 as what reads the last norm; a tied one becomes a weight of its own
    a LayerNorm's bias       b → diag(g′) Tᵀ diag(1/g) b, where the planes are orthogonal to the all-ones vector

and R_l itself disappears: T_l z = R_l (T_{l−1} z). Tensors go by their GGUF names. Letters: d model width, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edge_steer.architectures import architecture
from edge_steer.errors import MismatchError, SteerError
from edge_steer.export.factors import Actions, Factor, Floats, Stack, stack_at, stack_of
from edge_steer.export.gguf_bytes import Mapped
from edge_steer.export.readers import check_experts, readers_of, steered_readers
from edge_steer.sites import Architecture, Site
from edge_steer.steering import Steering

Float32s = NDArray[np.float32]
Blocks = Callable[[], Iterator[Float32s]]  # a tensor's rows (…, width), block by block, each time anew
HEAD, HEAD_NORM, EMBEDDING = "output.weight", "output_norm.weight", "token_embd.weight"
_ATTENTION_WRITERS = ("attn_output",)
_FEED_FORWARD_WRITERS = ("ffn_down", "ffn_down_exps", "ffn_down_shexp")
# Share of its length that a plane may have along the all-ones vector, which float32 does not keep at 0.
_ALONG_ONES = 1e-4


@dataclass(frozen=True)
class Reads:
    """A weight that reads a norm: W → W R diag(g) T diag(1/g′), R the turns `at` the norm, T those of the `stream`.

    gain: g (d,), where the stream is turned.
    """

    at: Stack | None = None
    stream: Stack | None = None
    gain: Floats | None = None

    @cached_property
    def left(self) -> Floats:
        """(r, d): all that W is multiplied with first, at any dial."""
        return np.concatenate([*([self.at.span] if self.at else []), *([self._scaled] if self.stream else [])])

    @property
    def _scaled(self) -> Floats:
        assert self.stream is not None
        assert self.gain is not None
        return self.stream.span * self.gain

    def right(self, gain: Floats | None = None) -> Floats:
        """(r, d): what follows the core; with another norm weight g′ in place of g where `gain` is given."""
        at = [] if self.at is None else [self.at.span]
        if self.stream is None or self.gain is None:
            return np.concatenate(at)
        new = self.gain if gain is None else gain
        return np.concatenate([*(span * (self.gain / new) for span in at), self.stream.span / new])

    def core(self, actions: Actions) -> Floats:
        """(r, r): (I + NᵀKN)(I + LᵀGS/g) = I + [N; L]ᵀ [[K, K N Lᵀ G], [0, G]] [N; S/g], with L = S diag(g)."""
        if self.at is None or self.stream is None:
            only = self.at or self.stream
            assert only is not None
            return only.core(actions)
        k, g = self.at.core(actions), self.stream.core(actions)
        across = k @ (self.at.span @ self._scaled.T) @ g
        return np.block([[k, across], [np.zeros((len(g), len(k))), g]])

    def factor(self, actions: Actions, gain: Floats | None = None) -> Factor:
        """What W is multiplied with, for a norm weight `gain` in the file; None: as it is."""
        scale = None if gain is None or self.gain is None else self.gain / gain
        return Factor(self.left, self.core(actions), self.right(gain), scale)


@dataclass(frozen=True)
class Writes:
    """A weight that writes to the residual stream, or its bias: W → Tᵀ W."""

    stream: Stack
    bias: bool = False


@dataclass(frozen=True)
class Norm:
    """A norm that a turned stream goes into: its weight, or its bias (of a LayerNorm), takes other values."""

    stream: Stack
    weight: str  # the name of the norm's weight
    bias: bool = False


Part = Reads | Writes | Norm


@dataclass(frozen=True)
class Folding:
    """All tensors that change, by name. untied: the head is a copy of the embedding, which stays as it is."""

    steerings: tuple[Steering, ...]
    parts: dict[str, Part]
    untied: bool = False

    @property
    def weights(self) -> dict[str, Reads | Writes]:
        """The matrices among the parts: what an adapter can change."""
        return {
            name: part
            for name, part in self.parts.items()
            if isinstance(part, Reads) or (isinstance(part, Writes) and not part.bias)
        }

    @property
    def turns(self) -> int:
        """The most turns that one weight takes, one after another."""
        stacks = [[part.at, part.stream] if isinstance(part, Reads) else [part.stream] for part in self.parts.values()]
        return max(sum(len(stack.members) for stack in each if stack) for each in stacks)


def folding(
    steerings: Sequence[Steering], known: Architecture, tensors: Collection[str], norm: Callable[[str], Floats]
) -> Folding:
    """How `steerings`, in order, are folded into a model with `tensors`. norm: a norm's weight (d,) by its GGUF name.

    Raises SteerError, with the site's name, where they cannot be exact in weights.
    """
    at_norms = steered_readers(steerings, known, tensors)
    stacks = {site: stack_at(site, steerings) for site in set(at_norms.values())}
    parts: dict[str, Part] = {name: Reads(stacks[site]) for name, site in at_norms.items()}
    sites = stream_sites(steerings)
    untied = HEAD not in tensors and (bool(sites) or HEAD in parts)
    if untied and EMBEDDING not in tensors:
        raise SteerError(f"expected {HEAD} or {EMBEDDING} as the model's head, found neither; use the hook")
    if not sites:
        return Folding(tuple(steerings), parts, untied)
    check_stream(steerings, known)
    present = set(tensors)
    if HEAD_NORM not in present:
        raise SteerError(f"expected {HEAD_NORM} to fold {sites[0]} into the model, found none; use the hook")
    turns = [(site, number, each.basis_at(site)) for site in sites for number, each in enumerate(steerings)
             if site in each.steered]  # fmt: skip
    kinds = [kind for kind, how in known.kinds.items() if how.readers and kind != "output_norm"]
    for layer in range(sites[0].layer + 1, steerings[0].base.block_count):
        stream = stack_of([(number, basis) for site, number, basis in turns if site.layer < layer])
        for kind in kinds:
            site = Site(layer, kind)
            weight = f"blk.{layer}.{kind}.weight"
            _add_norm(parts, weight, stream, present)
            gain = norm(weight)
            for name in readers_of(site, known, present):
                before = parts.get(name)
                parts[name] = Reads(before.at if isinstance(before, Reads) else None, stream, gain)
        for name in _writers(layer, sites[0], present):
            parts[name] = Writes(stream)
            if (bias := f"{name.removesuffix('weight')}bias") in present:
                parts[bias] = Writes(stream, bias=True)
    stream = stack_of([(number, basis) for _, number, basis in turns])
    _add_norm(parts, HEAD_NORM, stream, present)
    before = parts.get(HEAD)
    parts[HEAD] = Reads(before.at if isinstance(before, Reads) else None, stream, norm(HEAD_NORM))
    return Folding(tuple(steerings), parts, untied)


def fold_gguf(steerings: Sequence[Steering], source: Mapped) -> Folding:
    """The folding of `steerings` into a GGUF, which must fit them and hold every expert."""
    model = source.model
    for steering in steerings:
        steering.check_fits(model.base)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    known = architecture(model.architecture, tensors)
    found = folding(steerings, known, tensors, source.vector)
    if found.untied and known.tied_only:
        raise SteerError(
            f"{known.name} has no head of its own in llama.cpp, so nothing is turned before it; use the hook, "
            "or calibrate with --sites attn_norm"
        )
    experts = model.metadata.get(f"{model.architecture}.expert_count", 0)
    shapes = {name: tensors[EMBEDDING if name == HEAD and found.untied else name].shape for name in found.weights}
    check_experts([(name, shape[2]) for name, shape in shapes.items() if len(shape) == 3], experts)
    for name, part in found.weights.items():
        width, what = shapes[name][0 if isinstance(part, Reads) else 1], "read" if isinstance(part, Reads) else "write"
        if width != model.embedding_length:
            raise MismatchError(f"expected {name} to {what} {model.embedding_length} values, it {what}s {width}")
    return found


def stream_sites(steerings: Sequence[Steering]) -> list[Site]:
    """The sites in the residual stream that one of `steerings` turns, in order."""
    return sorted({site for each in steerings for site in each.steered if site.kind == "layer_out"})


def check_stream(steerings: Sequence[Steering], known: Architecture) -> None:
    """Raise SteerError where turns of the residual stream cannot be folded into a model of the `known` architecture."""
    first = stream_sites(steerings)[0]
    if any(how.readers is None for how in known.kinds.values()):
        raise SteerError(f"{first}: the weights that read {known.name}'s norms behind it are not known; use the hook")
    if known.post_norms:
        raise SteerError(
            f"{first}: {known.name} normalises what a block writes ({', '.join(known.post_norms)}), so no weight can "
            "write a turned residual stream; use the hook, or calibrate with --sites attn_norm"
        )
    for steering in steerings:
        inside = [site for site in steering.steered if site.kind == "layer_out"]
        if inside and steering.operator != "selective":
            raise SteerError(
                f"steering {steering.name!r} at {inside[0]}: {steering.operator} does not keep lengths, so norms would "
                "see it; only selective is folded into the residual stream; use the hook"
            )
        if inside and known.layer_norm:
            along = max(float(np.abs(steering.basis_at(site).sum(-1)).max()) for site in inside)
            if along > _ALONG_ONES * np.sqrt(steering.base.embedding_length):
                raise SteerError(
                    f"steering {steering.name!r} at {inside[0]}: expected planes orthogonal to the all-ones vector, "
                    f"which {known.name}'s LayerNorms take off, got {along:.2g} along it; calibrate it again"
                )


def _writers(layer: int, first: Site, tensors: set[str]) -> list[str]:
    found = []
    for half, writers in (("attention", _ATTENTION_WRITERS), ("feed-forward network", _FEED_FORWARD_WRITERS)):
        names = [name for each in writers if (name := f"blk.{layer}.{each}.weight") in tensors]
        if not names:
            raise SteerError(
                f"expected what the {half} of block {layer} writes with ({', '.join(writers)}), found none, so {first} "
                "cannot be folded into the model; use the hook"
            )
        found += names
    return found


def _add_norm(parts: dict[str, Part], weight: str, stream: Stack, tensors: set[str]) -> None:
    if weight in tensors:
        parts[weight] = Norm(stream, weight)
    if (bias := f"{weight.removesuffix('weight')}bias") in tensors:
        parts[bias] = Norm(stream, weight, bias=True)
