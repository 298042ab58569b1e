"""A checkpoint's weights on their way into a GGUF, mapped and never read at once.

Letters: m rows, d columns of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.checkpoint import read_tensors
from edge_steer.safetensors_file import float32_rows


@dataclass(frozen=True)
class Weight:
    """A tensor that still lies on disk. Several `parts`, all of one shape, are stacked along a new first axis.

    parts:  memory maps; uint16 holds bfloat16. offset: added to every element.
    """

    parts: tuple[NDArray[Any], ...]
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """In numpy's order, slowest axis first."""
        shape: tuple[int, ...] = self.parts[0].shape
        return (len(self.parts), *shape) if len(self.parts) > 1 else shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_bfloat16(self) -> bool:
        return all(part.dtype == np.uint16 for part in self.parts)

    def rearrange(self, order: Callable[[NDArray[Any]], NDArray[Any]]) -> Weight:
        """The weight with `order` applied to each part: a permutation or a reshape, nothing that computes."""
        return replace(self, parts=tuple(order(part) for part in self.parts))

    def rows(self) -> Iterator[NDArray[np.float32]]:
        """Its rows in order as blocks (k, d) float32 of a bounded size; a vector is one row."""
        for part in self.parts:
            for rows in float32_rows(part):
                yield rows + np.float32(self.offset)


def read_weights(folder: Path) -> dict[str, Weight]:
    """Every tensor of the directory `folder` by its Hugging Face name. Raises what `read_tensors` raises, FormatError
    also for one that is no plain float."""
    tensors = read_tensors(folder)
    # One map a file, as every map holds a file open: a model of experts has more tensors than a process may open.
    files = {path: np.memmap(path, np.uint8, "r") for path in {tensor.path for tensor in tensors.values()}}
    return {name: Weight((tensor.values(files[tensor.path]),)) for name, tensor in tensors.items()}
