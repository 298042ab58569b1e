"""Calibration: contrasting prompts → recorded sums → directions → planes and mask → a Steering.

Letters: T sites kept, d model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_steer._version import __version__
from edge_steer.calibration.classes import Classes, filter_sites, record_classes, spares_sink
from edge_steer.calibration.directions import SMALLEST
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
from edge_steer.steering import Steering

if TYPE_CHECKING:
    from edge_steer.prompts import PromptSet


def _silent(_: object) -> None:
    """Neither progress nor notes."""


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
    _check_choices(operator, plane, mask)
    for side, given in (("positive", prompts.positive), ("negative", prompts.negative)):
        if not given:
            raise SteerError(f"expected at least one {side} prompt, got none")
    if mask is None:
        mask = "layer" if plane == "global" and operator not in ("standard", "adaptive") else "all"

    of_kind, chosen = filter_sites(recorder, plane, kinds, layers)
    recorded = tuple(recorder.sites[number] for number in of_kind)
    spare = spares_sink(operator, plane, recorded[0])
    classes = record_classes(
        recorder, prompts, of_kind, orthogonal_to=orthogonal_to, spare_sink=spare, step=step, note=note
    )
    wanted = np.isin(classes.numbers, chosen)
    if not wanted.any():
        raise SteerError("expected a site with a direction in these layers, got none; use other prompts or layers")

    basis, planar = _planes(classes, wanted, plane, operator, recorder.base.block_count, note)
    classes = classes.at(planar)
    b1 = np.broadcast_to(basis[:, 0], classes.unit.shape)
    on = select_sites(mask, discriminative(classes.positive, classes.negative, b1), classes.sites, recorded)
    if plane == "global" and RANK[operator] == 2:
        basis = orient_plane(basis[0], classes.mean[on].mean(0))[None]
    return _steering(recorder, prompts, classes, basis, on, operator, plane, name, orthogonal_to)


def _check_choices(operator: str, plane: str, mask: str | None) -> None:
    for what, value, known in (("operator", operator, OPERATORS), ("plane", plane, PLANES), ("mask", mask, MASKS)):
        if value not in known and not (what == "mask" and value is None):
            raise SteerError(f"expected {what} among {', '.join(known)}, got {value!r}")


def _planes(
    classes: Classes,
    wanted: NDArray[np.bool_],
    plane: Plane,
    operator: Operator,
    block_count: int,
    note: Callable[[str], object],
) -> tuple[Float64, NDArray[np.intp]]:
    """The basis (planes, rank, d) of the sites that are `wanted` (T,), and which of the T those with a plane are.

    Directions of the other sites still count: for the choice of the shared plane, and for how far norms lean.
    """
    rank, unit, mean = RANK[operator], classes.unit, classes.mean
    if classes.sink is not None:
        mean = mean - (mean * classes.sink).sum(-1, keepdims=True) * classes.sink
    if plane == "shared":
        at = [reference_site(classes.sites, block_count)]
        basis = local_planes(unit[at], mean[at])[0] if rank == 2 else unit[at][:, None, :]
        return basis, np.flatnonzero(wanted)
    if plane == "global":
        unit = unit[wanted]
        basis = global_plane(unit)[None] if rank == 2 else unit[best_direction(unit)][None, None]
        return basis, np.flatnonzero(wanted)
    if rank == 1:
        return unit[wanted][:, None, :], np.flatnonzero(wanted)
    # One angle for all sites; where the model itself turns little, a norm's plane leans away from its mean.
    angles = class_angles(classes.positive, classes.negative)
    leans = operator == "selective" and angles.any() and classes.sites[0].kind != "layer_out"
    share = np.sqrt(angles / angles[wanted].max()).clip(max=1) if leans else None
    basis, planar = local_planes(unit, mean, share)
    for number in sorted(set(range(len(unit))) - set(planar.tolist())):
        note(f"{classes.sites[number]} is left out: its mean activation is parallel to its direction")
    return basis[wanted[planar]], planar[wanted[planar]]


def _steering(
    recorder: Recorder,
    prompts: PromptSet,
    classes: Classes,
    basis: Float64,
    on: NDArray[np.bool_],
    operator: Operator,
    plane: Plane,
    name: str | None,
    orthogonal_to: Sequence[PromptSet | Steering],
) -> Steering:
    """The steering, with what calibration knows of its sites: separation, mean norm, class means along b1."""
    stored, count = basis.astype(np.float32), len(classes.sites)
    sides = (classes.negative, classes.positive)
    b1 = np.broadcast_to(basis[:, 0], classes.unit.shape)
    return Steering(
        name=prompts.name if name is None else name,
        operator=operator,
        plane=plane,
        sites=classes.sites,
        mask=on,
        site_plane=np.arange(count, dtype=np.uint32) if plane == "local" else np.zeros(count, np.uint32),
        basis=stored,
        base=recorder.base,
        separation=separation(classes.positive, classes.negative, b1, classes.mean_norm).astype(np.float32),
        mean_norm=classes.mean_norm.astype(np.float32),
        class_means=np.stack([(each.mean * stored[:, 0]).sum(-1) for each in sides], axis=-1).astype(np.float32),
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
            positive_count=classes.positive.count,
            negative_count=classes.negative.count,
            orthogonal_to=tuple(each.name for each in orthogonal_to),
        ),
    )


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
