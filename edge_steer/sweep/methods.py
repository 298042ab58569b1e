"""The methods to compare: what each makes of the same recorded prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edge_steer.calibration import calibrate
from edge_steer.calibration.sums import Recorder, Step
from edge_steer.errors import SteerError
from edge_steer.prompts import PromptSet
from edge_steer.steering import Steering

# What `calibrate` is asked for. `local` turns at the norms before attention, `stream` the residual stream; `global` is
# the published method; `standard` and `adaptive` as published with it; `ablation` and `addition` along the directions
# of `local`.
METHODS: dict[str, dict[str, Any]] = {
    "local": {},
    "stream": {"kinds": ("layer_out",)},
    "global": {"plane": "global"},
    "standard": {"plane": "global", "operator": "standard"},
    "adaptive": {"plane": "global", "operator": "adaptive"},
    "ablation": {"operator": "ablation"},
    "addition": {"operator": "addition"},
}

# Sites that all methods can be made from.
RECORDED_SITES = "pre,layer_out"


def check_methods(methods: Sequence[str]) -> None:
    """Raise SteerError for a name that is no method, and where one is named twice."""
    for name in methods:
        if name not in METHODS:
            raise SteerError(f"expected methods among {', '.join(METHODS)}, got {name!r}")
    if len(set(methods)) != len(methods):
        raise SteerError(f"expected each method once, got {', '.join(methods)}")


def calibrate_methods(
    recorder: Recorder,
    prompts: PromptSet,
    methods: Sequence[str],
    step: Step,
    note: Callable[[str], object],
) -> list[Steering]:
    """A steering for each method, named after it; one that the prompts do not allow is told to `note` and left out.

    recorder: of RECORDED_SITES. Hand in a CachedRecorder, and the prompts are run once.
    Raises SteerError if no method is left.
    """
    check_methods(methods)
    made = []
    for name in methods:
        try:
            made.append(calibrate(recorder, prompts, name=name, step=step, **METHODS[name]))
        except SteerError as error:
            note(f"{name} is left out: {error}")
    if not made:
        raise SteerError("expected a method that these prompts allow, got none; see the notes above")
    return made
