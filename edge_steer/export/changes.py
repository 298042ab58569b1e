"""A folding written into weights: the new rows of every tensor that changes, block by block.

Letters: d model width, r rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from edge_steer.errors import SteerError
from edge_steer.export.factors import Actions, Factor, Floats, Stack
from edge_steer.export.folding import Blocks, Float32s, Folding, Norm, Reads, Writes


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
                return apply_to_writer(part.stream.span, core, blocks)
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


def apply_to_writer(span: Floats, core: Floats, blocks: Blocks) -> Iterator[Float32s]:
    """Tᵀ W = W + Sᵀ (Gᵀ (S W)), rows (m, in) of W with m = d, or of several such weights one after another."""
    change = np.einsum("rq,erk->eqk", core.astype(np.float32), project_rows(span, blocks))
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


def project_rows(span: Floats, blocks: Blocks) -> Float32s:
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
