"""Steerings folded into a model while it is converted, before any rounding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edge_steer.architectures import architecture
from edge_steer.converters.source import Source
from edge_steer.errors import SteerError
from edge_steer.export.changes import Changes
from edge_steer.export.folding import EMBEDDING, HEAD, folding
from edge_steer.export.readers import linear_actions
from edge_steer.steering import Steering


def baking(source: Source, steering: Sequence[tuple[Steering, float | None]]) -> tuple[Source, Changes | None]:
    """The source and what `write` needs to turn each (steering, dial) into its weights; None where none is on.

    Where the head is the embedding and is turned, the source returned has it as a weight of its own.
    """
    for each, _ in steering:
        if warning := each.check_fits(source.base):
            warnings.warn(warning, stacklevel=2)
    dialled = [(each, dial) for each, dial in steering if each.action(dial) is not None]
    if not dialled:
        return source, None
    on, actions = linear_actions(dialled)

    def vector(name: str) -> NDArray[np.float64]:
        return np.concatenate([rows.ravel() for rows in source.weights[name].rows()]).astype(np.float64)

    folded = folding(on, architecture(source.family.arch), source.weights, vector)
    if folded.untied:
        if source.family.tied_only:
            raise SteerError(f"llama.cpp's {source.family.arch} has no head of its own, so nothing is turned before it")
        source = replace(source, weights={**source.weights, HEAD: source.weights[EMBEDDING]})
    return source, Changes(folded, actions, vector)
