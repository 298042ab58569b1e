"""Calibration in one call, as `edge_steer.calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_steer.calibration.engines import NativeEngine
from edge_steer.calibration.pipeline import REFUSAL, CalibrationOptions, calibrate_model
from edge_steer.errors import SteerError
from edge_steer.fetch import resolve
from edge_steer.preset import load_preset, preset_names
from edge_steer.prompts import Prompt, PromptSet
from edge_steer.steering import Steering


def calibrate(
    model: str | Path,
    positive: Sequence[str | Prompt] | PromptSet,
    negative: Sequence[str | Prompt] | None = None,
    *,
    name: str | None = None,
    options: CalibrationOptions | None = None,
    **llama: Any,
) -> Steering:
    """The steering that turns what a GGUF does with the negative prompts into what it does with the positive ones.

    model: a .gguf file, or a name from `edge-steer models`, which is fetched if need be.
    positive, negative: the prompts of the two sides; or a preset (`load_preset`) alone.
    options: what to choose by hand; left out, sites, planes and dial are measured, as on the command line.
    llama: parameters of SteeredLlama, such as n_threads.
    Raises SteerError if there is nothing to turn.
    """
    prompts = _prompt_set(positive, negative, name or "steering")
    if options is None:
        is_mood = prompts.name in preset_names() and prompts == load_preset(prompts.name) and prompts.name != REFUSAL
        options = CalibrationOptions(orthogonal_to=None if is_mood else ())
    return calibrate_model(NativeEngine(str(resolve(model, fetch=True)), llama), prompts, options, name=name)


def _prompt_set(
    positive: Sequence[str | Prompt] | PromptSet, negative: Sequence[str | Prompt] | None, name: str
) -> PromptSet:
    if isinstance(positive, PromptSet):
        if negative is not None:
            raise SteerError("expected a preset alone, got negative prompts beside it; give two lists instead")
        return positive
    if negative is None or isinstance(positive, str) or isinstance(negative, str):
        raise SteerError("expected two lists of prompts, positive and negative, or a preset")
    return PromptSet(name, "", "positive", "negative", _prompts(positive), _prompts(negative))


def _prompts(side: Sequence[str | Prompt]) -> tuple[Prompt, ...]:
    return tuple(each if isinstance(each, Prompt) else Prompt(each) for each in side)
