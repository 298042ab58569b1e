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

from edge_steer.errors import MismatchError, SteerError
from edge_steer.export.factors import Actions, Factor, Floats, Stack, stack_at, stack_of
from edge_steer.export.gguf_bytes import Mapped
from edge_steer.export.readers import check_experts, readers_of, steered_readers
from edge_steer.sites import Architecture, Site, architecture
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
    def in_stream(self) -> bool:
        """Whether the residual stream itself is turned."""
        return any(
            isinstance(part, Writes) or (isinstance(part, Reads) and part.stream) for part in self.parts.values()
        )

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
    steerings: Sequence[Steering],
    known: Architecture,
    tensors: Collection[str],
    norm: Callable[[str], Floats],
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
    if known.post_norms:
        raise SteerError(
            f"{first}: {known.name} normalises what a block writes before it adds it "
            f"({', '.join(known.post_norms)}), so a rotation of the residual stream cannot be folded into its "
            "weights; use the hook, or calibrate with --sites attn_norm"
        )
    for steering in steerings:
        inside = [site for site in steering.steered if site.kind == "layer_out"]
        if not inside:
            continue
        if steering.operator != "selective":
            raise SteerError(
                f"steering {steering.name!r} at {inside[0]}: {steering.operator} does not keep lengths, so norms would "
                "see it; only selective is folded into the residual stream; use the hook"
            )
        if known.layer_norm:
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


# --- written into the weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """What baking writes: for each tensor of a folding, its new rows from its old ones, at given dials.

    norm: a norm's weight or bias by name. rounded: a norm's weight as the file's type will hold it.
    """

    folding: Folding
    actions: Actions
    norm: Callable[[str], Floats]
    rounded: Callable[[Floats], Floats] = lambda gain: gain.astype(np.float32).astype(np.float64)

    def __contains__(self, name: str) -> bool:
        return name in self.folding.parts

    def __len__(self) -> int:
        return len(self.folding.parts)

    def rows(self, name: str, blocks: Blocks) -> Iterator[Float32s]:
        """The new rows of the tensor `name`, block by block. Those of a head that was tied come from the embedding."""
        part = self.folding.parts[name]
        match part:
            case Reads():
                factor = part.factor(self.actions, self._gain(part))
                return map(factor.turn, blocks())
            case Writes():
                core = part.stream.core(self.actions)
                if part.bias:  # (Tᵀb)ᵀ = bᵀT
                    return map(Factor(part.stream.span, core, part.stream.span).turn, blocks())
                return written(part.stream.span, core, blocks)
            case Norm():
                return iter([self._norm(name, part).astype(np.float32)[None]])

    def _gain(self, part: Reads) -> Floats | None:
        return None if part.stream is None or part.gain is None else self._new_gain(part.stream, part.gain)

    def _new_gain(self, stream: Stack, gain: Floats) -> Floats:
        """g′ (d,): the length of each column of diag(g) T, so that the columns of what reads it keep theirs.

        With g itself, a small gᵢ would blow up column i of every weight, and with it the block that it is rounded in.
        """
        scaled, mixed = stream.span * gain, stream.core(self.actions) @ stream.span
        square = gain**2 + 2 * gain * (scaled * mixed).sum(0) + (mixed * (scaled @ scaled.T @ mixed)).sum(0)
        length = np.sqrt(np.maximum(square, 0))
        new = self.rounded(np.where(gain < 0, -length, length))
        return np.where(new == 0, self.rounded(np.ones_like(gain)), new)

    def _norm(self, name: str, part: Norm) -> Floats:
        gain = self.norm(part.weight)
        new = self._new_gain(part.stream, gain)
        if not part.bias:
            return new
        if not gain.all():
            raise SteerError(f"expected {part.weight} without zeros to fold a rotation into {name}, found one")
        stream = part.stream
        bias = self.norm(name) / gain
        turned: Floats = bias + (bias @ stream.span.T) @ stream.core(self.actions) @ stream.span  # (Tᵀ x)ᵀ = xᵀ T
        return new * turned


def written(span: Floats, core: Floats, blocks: Blocks) -> Iterator[Float32s]:
    """Tᵀ W = W + Sᵀ (Gᵀ (S W)), rows (m, in) of W with m = d, or of several such weights one after another."""
    change = np.einsum("rq,erk->eqk", core.astype(np.float32), spanned(span, blocks))
    width, at = span.shape[1], 0
    for rows in blocks():
        new = np.array(rows, np.float32)
        done = 0
        while done < len(rows):
            expert, first = divmod(at, width)
            count = min(len(rows) - done, width - first)
            new[done : done + count] += span[:, first : first + count].T.astype(np.float32) @ change[expert]
            done, at = done + count, at + count
        yield new


def spanned(span: Floats, blocks: Blocks) -> Float32s:
    """S W (E, r, in) of the rows (E·d, in) of a weight, or of E experts one after another."""
    found: list[Float32s] = []
    width, at = span.shape[1], 0
    for rows in blocks():
        done = 0
        while done < len(rows):
            expert, first = divmod(at, width)
            count = min(len(rows) - done, width - first)
            part = span[:, first : first + count].astype(np.float32) @ rows[done : done + count]
            if expert == len(found):
                found.append(part)
            else:
                found[expert] += part
            done, at = done + count, at + count
    return np.stack(found)


# --- as the two thin matrices of an adapter ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves:
    """An adapter's change of one weight, B core(actions) A or its like. a: (r, in), b: (m, r); of E experts (E, …).

    transposed: the core is, for a weight that writes.
    """

    a: Float32s
    b: Float32s
    part: Reads | Writes

    def lora_b(self, core: Callable[[Reads | Writes], Floats]) -> Float32s:
        """lora_b (m, r) for the core of this weight's turns."""
        own = core(self.part)
        return np.asarray(self.b @ (own.T if isinstance(self.part, Writes) else own).astype(np.float32))


def core_at(actions: Actions) -> Callable[[Reads | Writes], Floats]:
    """The core of each weight at these dials."""
    return lambda part: part.core(actions) if isinstance(part, Reads) else part.stream.core(actions)


def halves(name: str, part: Reads | Writes, blocks: Blocks, experts: int | None = None) -> Halves:
    """The halves of the weight `name`, which is read once. experts: how many it holds, None where it is none."""
    if isinstance(part, Writes):
        a = spanned(part.stream.span, blocks)
        b = np.broadcast_to(part.stream.span.T.astype(np.float32), (len(a), *part.stream.span.T.shape))
        return Halves(a, b, part) if experts is not None else Halves(a[0], b[0], part)
    if part.gain is not None and not part.gain.all():
        raise SteerError(f"{name} reads a norm whose weight holds a zero, which no adapter can undo; use --to gguf")
    left, right = part.left.astype(np.float32), part.right().astype(np.float32)
    b = np.concatenate([rows @ left.T for rows in blocks()])
    if experts is None:
        return Halves(right, b, part)
    return Halves(np.broadcast_to(right, (experts, *right.shape)), b.reshape(experts, -1, len(left)), part)


def check_adapter(folded: Folding, *, tied_is_fine: bool = False) -> None:
    """Raise SteerError where an adapter, which changes matrices only, cannot hold the folding exactly."""
    if folded.untied and not tied_is_fine:
        site = next(
            site for each in folded.steerings for site in each.steered if site.kind in ("layer_out", "output_norm")
        )
        raise SteerError(
            f"{site}: the head of this model is its embedding, and llama.cpp would apply an adapter at both; "
            "bake the steering instead (--to gguf), or calibrate with --sites attn_norm"
        )
    for name, part in folded.parts.items():
        if isinstance(part, Norm | Writes) and part.bias:
            raise SteerError(f"{name} would change, and an adapter changes no bias; use --to gguf or --to hf")
