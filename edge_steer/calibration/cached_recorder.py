"""A recorder that records each class once, however many steerings are made from it."""

from __future__ import annotations

from collections.abc import Sequence

from edge_steer.calibration.sums import ClassSums, Recorder, Step
from edge_steer.prompts import Prompt


class CachedRecorder:
    """A Recorder that answers from memory what `recorder` has recorded before: O(classes · sites · width)."""

    def __init__(self, recorder: Recorder) -> None:
        self.name, self.base, self.sites = recorder.name, recorder.base, recorder.sites
        self._recorder = recorder
        self._sums: dict[tuple[Prompt, ...], ClassSums] = {}

    def sums(self, prompts: Sequence[Prompt], step: Step) -> ClassSums:
        key = tuple(prompts)
        if key not in self._sums:
            self._sums[key] = self._recorder.sums(prompts, step)
        return self._sums[key]
