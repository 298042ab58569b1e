"""A recorder that records each class once, however many steerings are made from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_steer.calibrate.sums import ClassSums, Recorder, Step
from edge_steer.contrast import Prompt


class Remembered:
    """A Recorder that answers from memory what `recorder` has recorded before: O(prompts · sites · width)."""

    def __init__(self, recorder: Recorder) -> None:
        self.name, self.base, self.sites = recorder.name, recorder.base, recorder.sites
        self._recorder = recorder
        self._sums: dict[tuple[Prompt, ...], ClassSums] = {}
        self._rows: dict[tuple[Prompt, ...], list[NDArray[np.float32]]] = {}

    def sums(self, prompts: Sequence[Prompt], step: Step) -> ClassSums:
        key = tuple(prompts)
        if key not in self._sums:
            self._sums[key] = self._recorder.sums(prompts, step)
        return self._sums[key]

    def rows(self, prompts: Sequence[Prompt], step: Step) -> Iterator[NDArray[np.float32]]:
        key = tuple(prompts)
        if key not in self._rows:
            self._rows[key] = [row.copy() for row in self._recorder.rows(prompts, step)]
        yield from self._rows[key]
