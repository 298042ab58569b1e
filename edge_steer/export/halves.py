"""A folding as adapters hold it: two thin matrices for each weight that changes, the first the same at every dial.

Letters: d model width, m outputs of a weight, r rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_steer.errors import SteerError
from edge_steer.export.changes import project_rows
from edge_steer.export.factors import Actions, Floats
from edge_steer.export.folding import Blocks, Float32s, Folding, Norm, Reads, Writes


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
        a = project_rows(part.stream.span, blocks)
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
