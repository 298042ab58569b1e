"""Calibration: contrasting prompts → recorded sums → directions → planes and mask → a Steering.

Letters: S sites recorded, T of them kept, d model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_steer._version import __version__
from edge_steer.architectures import ARCHITECTURES
from edge_steer.calibration.directions import SMALLEST, axes_at, compute_directions, project_out, sink_axis
from edge_steer.calibration.planes import (
    best_direction,
    class_angles,
    discriminative,
    global_plane,
    local_planes,
    orient_plane,
    reference_site,
    select_sites,
)
from edge_steer.calibration.sums import ClassSums, Float64, Recorder, Step
from edge_steer.choices import MASKS, OPERATORS, PLANES, RANK, Mask, Operator, Plane
from edge_steer.errors import SteerError
from edge_steer.provenance import Made
from edge_steer.sites import OUTER_KINDS, Site
from edge_steer.steering import Steering

if TYPE_CHECKING:
    from edge_steer.prompts import Prompt, PromptSet

# Prompts a class from which a direction is made that is only projected out.
AXIS_PROMPTS = 32


def _silent(_: object) -> None:
    """Neither progress nor notes."""


def passes(prompts: PromptSet, orthogonal_to: Sequence[PromptSet | Steering] = ()) -> int:
    """How many prompts `calibrate` runs in all: what its `step` calls add up to."""
    axes = [each.first(AXIS_PROMPTS) for each in orthogonal_to if not isinstance(each, Steering)]
    return sum(len(each.positive) + len(each.negative) for each in (prompts, *axes))


def calibrate(
    recorder: Recorder,
    prompts: PromptSet,
    *,
    plane: Plane = "local",
    operator: Operator = "selective",
    mask: Mask | None = None,
    kinds: Collection[str] | None = None,
    layers: tuple[int, int] | None = None,
    orthogonal_to: Sequence[PromptSet | Steering] = (),
    name: str | None = None,
    step: Step = _silent,
    note: Callable[[str], object] = _silent,
) -> Steering:
    """The steering that turns what `recorder`'s model does with the negative prompts into what it does with the
    positive ones.

    plane: a plane for each site (`local`), that of the site at 0.7 of the depth for all (`shared`), or the published
    one (`global`).
    mask: None is `all`, as measured best, but `layer` for the global plane, as published with `selective`.
    kinds: of the recorded sites, those to calibrate. None: the norms that attention reads; with the global plane all
    norms, as published.
    layers: first and last block of those sites. None: all, but the upper half with `layer_out` or `output_norm`.
    orthogonal_to: prompts or steerings whose own directions are projected out of these.
    name: None is the name of the prompts. step: called with k after every k further prompts, `passes(…)` in all.
    note: called with a line for each site that is left out.
    Raises SteerError if there is nothing to turn: no prompts, equal classes, no plane, an empty mask.
    """
    for what, value, known in (("operator", operator, OPERATORS), ("plane", plane, PLANES), ("mask", mask, MASKS)):
        if value not in known and not (what == "mask" and value is None):
            raise SteerError(f"expected {what} among {', '.join(known)}, got {value!r}")
    for side, given in (("positive", prompts.positive), ("negative", prompts.negative)):
        if not given:
            raise SteerError(f"expected at least one {side} prompt, got none")
    if mask is None:
        mask = "layer" if plane == "global" and operator not in ("standard", "adaptive") else "all"

    of_kind, chosen = filter_sites(recorder, plane, kinds, layers)
    recorded = tuple(recorder.sites[number] for number in of_kind)
    positive, negative = (class_sums(recorder, each, step).at(of_kind) for each in (prompts.positive, prompts.negative))
    found = compute_directions(recorded, positive, negative)
    kept, unit = found.kept, found.unit
    for number in sorted(set(range(len(recorded))) - set(kept.tolist())):
        note(f"{recorded[number]} is left out: both classes have the same mean activation there")
    sites = tuple(recorded[number] for number in kept)
    axes = [_axis(recorder, each, of_kind[kept], sites, step) for each in orthogonal_to]
    sink = sink_axis(positive.at(kept), negative.at(kept)) if spares_sink(operator, plane, sites) else None
    if sink is not None:
        axes.append(sink)
    if axes:
        unit, apart = project_out(unit, axes)
        kept = kept[apart]
        sink = None if sink is None else sink[apart]
    inside = np.isin(of_kind[kept], chosen)
    if not inside.any():
        raise SteerError("expected a site with a direction in these layers, got none; use other prompts or layers")

    mean = ((positive.mean + negative.mean) / 2)[kept]
    if sink is not None:
        mean = mean - (mean * sink).sum(-1, keepdims=True) * sink
    angles = class_angles(positive.at(kept), negative.at(kept))
    sites = tuple(recorded[number] for number in kept)
    if plane == "shared":
        at = reference_site(sites, recorder.base.block_count)
        basis = local_planes(unit[[at]], mean[[at]])[0] if RANK[operator] == 2 else unit[[at]][:, None, :]
    elif plane == "global":
        unit = unit[inside]
        basis = global_plane(unit)[None] if RANK[operator] == 2 else unit[best_direction(unit)][None, None]
    elif RANK[operator] == 2:
        # One angle for all sites; where the model itself turns little, a norm's plane leans away from its mean.
        leans = operator == "selective" and angles.any() and sites[0].kind != "layer_out"
        share = np.sqrt(angles / angles[inside].max()).clip(max=1) if leans else None
        basis, flat = local_planes(unit, mean, share)
        for number in sorted(set(range(len(kept))) - set(flat.tolist())):
            note(f"{sites[number]} is left out: its mean activation is parallel to its direction")
        kept, inside = kept[flat], inside[flat]
        basis = basis[inside]
    else:
        basis = unit[inside][:, None, :]
    kept = kept[inside]
    sites = tuple(recorded[number] for number in kept)
    positive, negative = positive.at(kept), negative.at(kept)
    mean = (positive.mean + negative.mean) / 2
    b1 = np.broadcast_to(basis[:, 0], mean.shape)
    on = select_sites(mask, discriminative(positive, negative, b1), sites, recorded)
    if plane == "global" and RANK[operator] == 2:
        basis = orient_plane(basis[0], mean[on].mean(0))[None]
    stored = basis.astype(np.float32)
    along = [(each.mean * stored[:, 0]).sum(-1) for each in (negative, positive)]
    mean_norm = (positive.norm + negative.norm) / (positive.count + negative.count)

    return Steering(
        name=prompts.name if name is None else name,
        operator=operator,
        plane=plane,
        sites=sites,
        mask=on,
        site_plane=np.arange(len(sites), dtype=np.uint32) if plane == "local" else np.zeros(len(sites), np.uint32),
        basis=stored,
        base=recorder.base,
        separation=separation(positive, negative, b1, mean_norm).astype(np.float32),
        mean_norm=mean_norm.astype(np.float32),
        class_means=np.stack(along, axis=-1).astype(np.float32),
        description=prompts.description,
        positive=prompts.positive_name,
        negative=prompts.negative_name,
        # Published with the adaptive operator.
        threshold=0.0 if operator == "adaptive" else math.nan,
        made=Made(
            recorder=recorder.name,
            model=recorder.base.name,
            prompts_sha256=prompts.sha256,
            version=__version__,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            positive_count=positive.count,
            negative_count=negative.count,
            orthogonal_to=tuple(each.name for each in orthogonal_to),
        ),
    )


def spares_sink(operator: Operator, plane: Plane, sites: Sequence[Site]) -> bool:
    """Whether planes are made orthogonal to the attention sink: rotations of the residual stream, where the first
    token is a hundred times as long as any other, and turning it disturbs what every token attends to."""
    return operator == "selective" and plane != "global" and sites[0].kind == "layer_out"


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


def _axis(
    recorder: Recorder, of: PromptSet | Steering, at: NDArray[np.intp], sites: Sequence[Site], step: Step
) -> Float64:
    """The unit direction (T, d) at each of `sites` of what is to be projected out; 0 where it has none."""
    if isinstance(of, Steering):
        of.check_fits(recorder.base)
        return axes_at(sites, of)
    few = of.first(AXIS_PROMPTS)
    positive, negative = (class_sums(recorder, each, step).at(at) for each in (few.positive, few.negative))
    found = compute_directions(sites, positive, negative)
    axis = np.zeros((len(sites), recorder.base.embedding_length))
    axis[found.kept] = found.unit
    return axis


def separation(positive: ClassSums, negative: ClassSums, b1: Float64, mean_norm: Float64) -> Float64:
    """(T,) |mean₊ − mean₋| of b1·h at each site, in pooled standard deviations, over the kept activations of each
    class. NaN with fewer than 2 prompts in a class, and where all prompts of a class give one activation. b1: (T, d).
    """
    along = [(each.rows * b1).sum(-1) for each in (positive, negative)]
    counts = [len(each) for each in along]
    if min(counts) < 2:
        return np.full(len(b1), math.nan)
    squares = sum(((each - each.mean(0)) ** 2).sum(0) for each in along)
    deviation = np.sqrt(squares / (sum(counts) - 2))
    distance = np.abs(along[0].mean(0) - along[1].mean(0))
    # Prompts that end alike give one activation up to float32 rounding: early layers, narrow sliding windows.
    varies = deviation > SMALLEST * mean_norm
    return np.asarray(np.divide(distance, deviation, out=np.full(len(b1), math.nan), where=varies))
