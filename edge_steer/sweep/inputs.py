"""What is swept, and on which texts, from a user's files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edge_steer.calibration.dial import has_range
from edge_steer.errors import SteerError
from edge_steer.gguf_metadata import read_gguf
from edge_steer.measure.evaluation_set import find_preset
from edge_steer.preset import load_preset
from edge_steer.prompt_files import prompt_set, read_probes
from edge_steer.prompts import Probe, PromptSet
from edge_steer.steering import Steering

# Of a user's own prompts, every fifth is kept from calibration.
HELD_OUT = 5


@dataclass(frozen=True)
class SweepInputs:
    """The steerings to measure; none where methods are to be calibrated first, on `prompts`. held_out: prompts of the
    two classes that nothing was calibrated on. probes: what the effect is measured with."""

    steerings: tuple[Steering, ...]
    prompts: PromptSet | None
    held_out: PromptSet | None
    probes: tuple[Probe, ...]

    @property
    def without_range(self) -> list[Steering]:
        """The steerings that have no range around off to store."""
        return [each for each in self.steerings if not has_range(each)]


def read_inputs(
    steering_file: str | None, *, preset: str | None, positive: str | None, negative: str | None, probes: str | None
) -> SweepInputs:
    """Steerings from their file, or prompts to calibrate methods on.

    preset: with a file its probes only. positive, negative: held out with a file, else calibrated on. probes: a file of
    them; None: those of the preset given, or of that which the file's steerings were calibrated on.
    """
    own_probes = read_probes(probes) if probes else ()
    if steering_file is not None:
        steerings = Steering.load_all(steering_file)
        held_out = prompt_set(positive, negative, "held-out") if positive and negative else None
        known = load_preset(preset) if preset else find_preset(steerings[0])
        return SweepInputs(tuple(steerings), None, held_out, own_probes or (known.probes if known else ()))
    if preset is not None:
        known = load_preset(preset)
        return SweepInputs((), known, None, own_probes or known.probes)
    prompts, held_out = _hold_out(prompt_set(str(positive), str(negative), "own"))
    return SweepInputs((), prompts, held_out, own_probes)


def _hold_out(prompts: PromptSet) -> tuple[PromptSet, PromptSet | None]:
    """The prompts to calibrate on, and those held out, where there are enough."""
    sides = (prompts.positive, prompts.negative)
    if min(map(len, sides)) < 2 * HELD_OUT:
        return prompts, None
    kept = [tuple(each for i, each in enumerate(side) if (i + 1) % HELD_OUT) for side in sides]
    held_out = [side[HELD_OUT - 1 :: HELD_OUT] for side in sides]
    return (
        replace(prompts, positive=kept[0], negative=kept[1]),
        replace(prompts, positive=held_out[0], negative=held_out[1]),
    )


def check_can_store(steering_file: str) -> None:
    """Raise SteerError where a file is a model with steerings in it: a range is stored by writing the file anew."""
    if read_gguf(Path(steering_file), lambda key: key == "steering.count").tensors:
        raise SteerError(f"{steering_file} is a model that embeds a steering; --write needs a steering file of its own")
