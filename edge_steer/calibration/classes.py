"""What two classes of prompts do at a recorder's sites: which sites, their sums, and the directions between them.

Letters: S sites recorded, T of them kept, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_steer.architectures import ARCHITECTURES
from edge_steer.calibration.directions import axes_at, compute_directions, project_out, sink_axis
from edge_steer.calibration.sums import ClassSums, Float64, Recorder, Step
from edge_steer.choices import Operator, Plane
from edge_steer.errors import SteerError
from edge_steer.sites import OUTER_KINDS, Site
from edge_steer.steering import Steering

if TYPE_CHECKING:
    from edge_steer.prompts import Prompt, PromptSet

# Prompts a class from which a direction is made that is only projected out.
AXIS_PROMPTS = 32


@dataclass(frozen=True, eq=False)
class Classes:
    """Both classes at the T sites that have a direction.

    numbers: (T,) which of the recorder's sites they are. unit: (T, d) the directions, from negative to positive.
    sink: (T, d) the unit direction that was kept out of them for the attention sink; None: none was.
    """

    sites: tuple[Site, ...]
    numbers: NDArray[np.intp]
    positive: ClassSums
    negative: ClassSums
    unit: Float64
    sink: Float64 | None = None

    def at(self, which: NDArray[np.intp]) -> Classes:
        """At some of these sites only."""
        return Classes(
            tuple(self.sites[number] for number in which),
            self.numbers[which],
            self.positive.at(which),
            self.negative.at(which),
            self.unit[which],
            None if self.sink is None else self.sink[which],
        )

    @property
    def mean(self) -> Float64:
        """(T, d) halfway between the means of the classes."""
        return np.asarray((self.positive.mean + self.negative.mean) / 2)

    @property
    def mean_norm(self) -> Float64:
        """(T,) mean norm of an activation."""
        sums = self.positive.norm + self.negative.norm
        return np.asarray(sums / (self.positive.count + self.negative.count))


def passes(prompts: PromptSet, orthogonal_to: Sequence[PromptSet | Steering] = ()) -> int:
    """How many prompts `calibrate` runs in all: what its `step` calls add up to."""
    axes = [each.first(AXIS_PROMPTS) for each in orthogonal_to if not isinstance(each, Steering)]
    return sum(len(each.positive) + len(each.negative) for each in (prompts, *axes))


def record_classes(
    recorder: Recorder,
    prompts: PromptSet,
    numbers: NDArray[np.intp],
    *,
    orthogonal_to: Sequence[PromptSet | Steering],
    spare_sink: bool,
    step: Step,
    note: Callable[[str], object],
) -> Classes:
    """The classes of `prompts` at the recorder's sites `numbers`, of which those without a direction are left out.

    orthogonal_to, spare_sink: what is projected out of the directions; see `calibrate` and `spares_sink`.
    """
    recorded = tuple(recorder.sites[number] for number in numbers)
    positive, negative = (class_sums(recorder, each, step).at(numbers) for each in (prompts.positive, prompts.negative))
    found = compute_directions(recorded, positive, negative)
    for number in sorted(set(range(len(recorded))) - set(found.kept.tolist())):
        note(f"{recorded[number]} is left out: both classes have the same mean activation there")
    kept = found.kept
    sites = tuple(recorded[number] for number in kept)
    classes = Classes(sites, numbers[kept], positive.at(kept), negative.at(kept), found.unit)
    axes = [_axis(recorder, each, classes, step) for each in orthogonal_to]
    sink = sink_axis(classes.positive, classes.negative) if spare_sink else None
    if sink is not None:
        axes.append(sink)
    if not axes:
        return classes
    unit, apart = project_out(classes.unit, axes)
    left = classes.at(apart)
    return Classes(left.sites, left.numbers, left.positive, left.negative, unit, None if sink is None else sink[apart])


def spares_sink(operator: Operator, plane: Plane, site: Site) -> bool:
    """Whether planes are made orthogonal to the attention sink: rotations of the residual stream, where the first
    token is a hundred times as long as any other, and turning it disturbs what every token attends to."""
    return operator == "selective" and plane != "global" and site.kind == "layer_out"


def filter_sites(
    recorder: Recorder, plane: Plane, kinds: Collection[str] | None, layers: tuple[int, int] | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which of the recorded sites are of `kinds`, and which of those are in `layers`, as `calibrate` takes both."""
    there = {site.kind for site in recorder.sites}
    if kinds is None:
        attention = next((kind for kind in ("attn_norm_2", "attn_norm") if kind in there), None)
        kinds = {attention} if attention and plane != "global" else there - set(OUTER_KINDS) or there
    of_kind = [number for number, site in enumerate(recorder.sites) if site.kind in kinds]
    if not of_kind:
        raise SteerError(f"expected a recorded site of kind {', '.join(kinds) or '(none)'}, got none")
    if plane == "shared" and len(kinds) > 1:
        raise SteerError(f"expected one kind of site for a shared plane, got {', '.join(sorted(kinds))}; give --sites")
    if plane == "local" and "layer_out" in kinds and len(kinds) > 1:
        raise SteerError("expected layer_out alone, or norms: one dial does not suit both; calibrate two steerings")
    count = recorder.base.block_count
    first, last = layers if layers is not None else (count // 2 if set(kinds) & set(OUTER_KINDS) else 0, count - 1)
    chosen = [number for number in of_kind if first <= recorder.sites[number].layer <= last]
    if not chosen:
        blocks = sorted({recorder.sites[number].layer for number in of_kind})
        raise SteerError(f"expected layers within {blocks[0]}-{blocks[-1]}, got {first}-{last}")
    return np.array(of_kind, np.intp), np.array(chosen, np.intp)


def class_sums(recorder: Recorder, prompts: Sequence[Prompt], step: Step) -> ClassSums:
    """The sums of a class; in the residual stream of a model with LayerNorms, of what those see of it."""
    architecture = ARCHITECTURES.get(recorder.base.architecture)
    sums = recorder.sums(prompts, step)
    if architecture is None or not architecture.layer_norm:
        return sums
    return sums.subtract_mean(np.array([site.kind == "layer_out" for site in recorder.sites]))


def _axis(recorder: Recorder, of: PromptSet | Steering, classes: Classes, step: Step) -> Float64:
    """The unit direction (T, d) at each site of `classes` of what is to be projected out; 0 where it has none."""
    if isinstance(of, Steering):
        of.check_fits(recorder.base)
        return axes_at(classes.sites, of)
    few = of.first(AXIS_PROMPTS)
    positive, negative = (class_sums(recorder, each, step).at(classes.numbers) for each in (few.positive, few.negative))
    found = compute_directions(classes.sites, positive, negative)
    axis = np.zeros_like(classes.unit)
    axis[found.kept] = found.unit
    return axis
