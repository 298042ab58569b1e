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
from edge_steer.calibrate.directions import SMALLEST, directions
from edge_steer.calibrate.planes import (
    MASKS,
    Mask,
    best_direction,
    class_angles,
    discriminative,
    global_plane,
    local_planes,
    oriented,
    steered,
)
from edge_steer.calibrate.sums import ClassSums, Float64, Recorder, Step
from edge_steer.errors import SteerError
from edge_steer.sites import Site
from edge_steer.steering import OPERATORS, PLANES, RANK, Made, Operator, Plane, Steering

if TYPE_CHECKING:
    from edge_steer.contrast import PromptSet

__all__ = ["ClassSums", "Mask", "Recorder", "calibrate", "passes"]

# Prompts a class in the second pass, which measures the separation: its error is a tenth of a standard deviation.
SEPARATION_PROMPTS = 64


def _silent(_: object) -> None:
    """Neither progress nor notes."""


def passes(prompts: PromptSet) -> int:
    """How many prompts `calibrate` runs in all: what its `step` calls add up to."""
    classes = (prompts.positive, prompts.negative)
    return sum(len(each) + min(len(each), SEPARATION_PROMPTS) for each in classes)


def calibrate(
    recorder: Recorder,
    prompts: PromptSet,
    *,
    plane: Plane = "local",
    operator: Operator = "selective",
    mask: Mask | None = None,
    kinds: Collection[str] | None = None,
    name: str | None = None,
    step: Step = _silent,
    note: Callable[[str], object] = _silent,
) -> Steering:
    """The steering that turns what `recorder`'s model does with the negative prompts into what it does with the
    positive ones.

    mask: None is `all`, as measured best, but `layer` for the global plane, as published with `selective`.
    kinds: of the recorded sites, those to calibrate. None: with local planes those that attention reads, as measured
    best, where there are any; with the global plane all, as published.
    name: None is the name of the prompts. step: called with k after every k further prompts, `passes(prompts)` in all.
    note: called with a line for each site that is left out.
    Raises SteerError where there is nothing to turn: no prompts, equal classes, no plane, an empty mask.
    """
    for what, value, known in (("operator", operator, OPERATORS), ("plane", plane, PLANES), ("mask", mask, MASKS)):
        if value not in known and not (what == "mask" and value is None):
            raise SteerError(f"expected {what} among {', '.join(known)}, got {value!r}")
    if operator != "addition" and any(site.kind == "layer_out" for site in recorder.sites):
        raise SteerError(f"expected operator addition at layer_out sites, got {operator}; use sites default or all")
    for side, given in (("positive", prompts.positive), ("negative", prompts.negative)):
        if not given:
            raise SteerError(f"expected at least one {side} prompt, got none")
    if mask is None:
        mask = "layer" if plane == "global" and operator not in ("standard", "adaptive") else "all"

    chosen = chosen_sites(recorder.sites, plane, kinds)
    recorded = tuple(recorder.sites[number] for number in chosen)
    positive = recorder.sums(prompts.positive, step).at(chosen)
    negative = recorder.sums(prompts.negative, step).at(chosen)
    found = directions(recorded, positive, negative)
    kept, unit = found.kept, found.unit
    for number in sorted(set(range(len(recorded))) - set(kept.tolist())):
        note(f"{recorded[number]} is left out: both classes have the same mean activation there")

    mean = (positive.mean + negative.mean) / 2
    if plane == "local" and RANK[operator] == 2:
        angles = class_angles(positive.at(kept), negative.at(kept))
        # Turning to an angle needs the mean itself in the plane; turning by one does not.
        share = np.sqrt(angles / angles.max()) if operator == "selective" and angles.any() else None
        basis, flat = local_planes(unit, mean[kept], share)
        for number in sorted(set(range(len(kept))) - set(flat.tolist())):
            note(f"{recorded[kept[number]]} is left out: its mean activation is parallel to its direction")
        kept = kept[flat]
    elif plane == "local":
        basis = unit[:, None, :]
    else:
        basis = global_plane(unit)[None] if RANK[operator] == 2 else unit[best_direction(unit)][None, None]
    sites = tuple(recorded[number] for number in kept)
    positive, negative, mean = positive.at(kept), negative.at(kept), mean[kept]
    b1 = np.broadcast_to(basis[:, 0], mean.shape)
    on = steered(mask, discriminative(positive, negative, b1), sites, recorded)
    if plane == "global" and RANK[operator] == 2:
        basis = oriented(basis[0], mean[on].mean(0))[None]

    mean_norm = (positive.norm + negative.norm) / (positive.count + negative.count)

    return Steering(
        name=prompts.name if name is None else name,
        operator=operator,
        plane=plane,
        sites=sites,
        mask=on,
        site_plane=np.arange(len(sites), dtype=np.uint32) if plane == "local" else np.zeros(len(sites), np.uint32),
        basis=basis.astype(np.float32),
        base=recorder.base,
        separation=separation(recorder, prompts, chosen[kept], b1, mean_norm, step).astype(np.float32),
        mean_norm=mean_norm.astype(np.float32),
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
        ),
    )


def chosen_sites(sites: Sequence[Site], plane: Plane, kinds: Collection[str] | None) -> NDArray[np.intp]:
    """Which of the recorded `sites` are calibrated: those of `kinds`, or as `calibrate` says for None."""
    if kinds is None and plane == "local":
        attention = "attn_norm_2" if any(site.kind == "attn_norm_2" for site in sites) else "attn_norm"
        kinds = (attention,) if any(site.kind == attention for site in sites) else None
    chosen = [number for number, site in enumerate(sites) if kinds is None or site.kind in kinds]
    if not chosen:
        raise SteerError(f"expected a recorded site of kind {', '.join(kinds or ()) or '(none)'}, got none")
    return np.array(chosen, np.intp)


def separation(
    recorder: Recorder, prompts: PromptSet, kept: NDArray[np.intp], b1: Float64, mean_norm: Float64, step: Step
) -> Float64:
    """(T,) |mean₊ − mean₋| of b1·h at each of the sites `kept`, in pooled standard deviations, over at most 64 prompts
    a class. NaN with fewer than 2 prompts in a class, and where all prompts of a class give one activation. b1: (T, d).
    """
    along = [
        np.stack([(row[kept] * b1).sum(-1) for row in recorder.rows(given[:SEPARATION_PROMPTS], step)])
        for given in (prompts.positive, prompts.negative)
    ]
    counts = [len(each) for each in along]
    if min(counts) < 2:
        return np.full(len(kept), math.nan)
    squares = sum(((each - each.mean(0)) ** 2).sum(0) for each in along)
    deviation = np.sqrt(squares / (sum(counts) - 2))
    distance = np.abs(along[0].mean(0) - along[1].mean(0))
    # Prompts that end alike give one activation up to float32 rounding: early layers, narrow sliding windows.
    varies = deviation > SMALLEST * mean_norm
    return np.asarray(np.divide(distance, deviation, out=np.full(len(kept), math.nan), where=varies))
