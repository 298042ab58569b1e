"""Dials: the one number each steering is turned with, and how the command line names them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from edge_steer.errors import SteerError
from edge_steer.gate import Gate, split_gate
from edge_steer.rotation import Action
from edge_steer.sharing.find import find_steerings
from edge_steer.steering import Steering

SteeringLike = Steering | str | Path


class FileDefault:
    """The type of FILE_DEFAULT: a dial that was not given, unlike None, which is off."""

    def __repr__(self) -> str:
        return "FILE_DEFAULT"


FILE_DEFAULT = FileDefault()


class Dials(MutableMapping[str, "float | None"]):
    """The dials of several steerings, by name. None is off; assigning acts from the next token on."""

    def __init__(self, steerings: Sequence[Steering]) -> None:
        self._steerings = {steering.name: steering for steering in steerings}
        self._values: dict[str, float | None] = dict.fromkeys(self._steerings)
        self._actions: tuple[Action | None, ...] = (None,) * len(self._steerings)
        self._scaled: tuple[Any, tuple[float, ...], tuple[Action | None, ...]] = (None, (), ())

    def __getitem__(self, name: str) -> float | None:
        self._demand(name)
        return self._values[name]

    def __setitem__(self, name: str, value: float | None) -> None:
        self._demand(name)
        self._steerings[name].action(value)  # refuses what is not a finite number
        self._values[name] = None if value is None else float(value)
        self._actions = tuple(each.action(self._values[each.name]) for each in self._steerings.values())

    def __delitem__(self, name: str) -> None:
        raise SteerError(f"a dial cannot be removed; set angles[{name!r}] = None to turn it off")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)

    def actions(self) -> tuple[Action | None, ...]:
        """What each steering does now, in order; the same tuple until a dial is set."""
        return self._actions

    def scale(self, factors: tuple[float, ...]) -> tuple[Action | None, ...]:
        """What each does with its dial multiplied by a factor from 0, which is off, to 1; the same tuple for the same
        dials and factors, asked for again."""
        if self._scaled[0] is not self._actions or self._scaled[1] != factors:
            found = tuple(
                action if factor == 1 else each.action((self._values[each.name] or 0.0) * factor) if factor else None
                for each, action, factor in zip(self._steerings.values(), self._actions, factors, strict=True)
            )
            self._scaled = (self._actions, factors, found)
        return self._scaled[2]

    def _demand(self, name: str) -> None:
        if name not in self._steerings:
            raise SteerError(f"expected a steering among {', '.join(self._steerings) or '(none)'}, got {name!r}")


def first_dials(
    steerings: Sequence[Steering], angle: float | FileDefault | None, angles: Mapping[str, float | None] | None
) -> Dials:
    """The dials to start with: what is given, else each file's default; off, with a warning, where it has none."""
    dials = Dials(steerings)
    given = dict(angles or {})
    if not isinstance(angle, FileDefault):
        if len(steerings) != 1:
            raise SteerError(f"angle is for one steering, there are {len(steerings)}; use angles")
        given.setdefault(steerings[0].name, angle)
    for each in steerings:
        if each.name in given:
            dials[each.name] = given.pop(each.name)
        elif each.has_default:
            dials[each.name] = each.default_dial()
        else:
            warnings.warn(f"steering {each.name!r} has no default angle, so it is off; set one", stacklevel=3)
    dials.update(given)  # a name that no steering bears is refused here
    return dials


def load_steerings(given: SteeringLike | Sequence[SteeringLike] | None) -> tuple[Steering, ...]:
    """Steerings from values and paths, in order. Raises SteerError if two bear the same name."""
    if given is None:
        return ()
    several = [given] if isinstance(given, (Steering, str, Path)) else list(given)
    found: list[Steering] = []
    for each in several:
        found += [each] if isinstance(each, Steering) else find_steerings(each)
    names = [each.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise SteerError(f"two steerings are called {name!r}; calibrate one again with another --name")
    return tuple(found)


def warn_of_overlap(steerings: Sequence[Steering]) -> None:
    """Two steerings whose b1 point the same way, or opposite, at a site turn the same property."""
    for i, one in enumerate(steerings):
        for other in steerings[i + 1 :]:
            shared = set(one.steered) & set(other.steered)
            overlap = max((abs(float(one.basis_at(site)[0] @ other.basis_at(site)[0])) for site in shared), default=0.0)
            if overlap > 0.5:
                warnings.warn(
                    f"steerings {one.name!r} and {other.name!r} overlap (|b1·b1′| up to {overlap:.2f}): "
                    "each also turns what the other does",
                    stacklevel=3,
                )


def split_dial(argument: str) -> tuple[str, float | None]:
    """`FILE:ANGLE` as its two parts. Split at the last colon only where a finite number follows.

    Not where there is a file of the whole name, and none of what stands before the colon.
    """
    path, colon, number = argument.rpartition(":")
    if colon and path and (Path(path).is_file() or not Path(argument).is_file()):
        try:
            dial = float(number)
        except ValueError:
            return argument, None
        if math.isfinite(dial):
            return path, dial
    return argument, None


def split_argument(argument: str) -> tuple[str, float | None, str | None]:
    """`FILE:ANGLE@GATE` as its three parts, of which the last two may be absent.

    Not where there is a file of the whole name. A gate begins behind the first name of a file, else where a condition
    is known.
    """
    if not Path(argument).is_file():
        for at in (place for place, sign in enumerate(argument) if sign == "@"):
            path, dial = split_dial(argument[:at])
            if Path(path).is_file():
                return path, dial, argument[at:]
        argument, gate = split_gate(argument)
        return *split_dial(argument), gate
    return *split_dial(argument), None


def load_argument(argument: str, model: str | Path | None = None) -> tuple[list[Steering], float | None]:
    """The steerings of a `FILE:ANGLE@GATE` argument, with its gate in place of their own, and its dial. FILE may be
    anything that `find_steerings` finds for `model`."""
    path, dial, text = split_argument(argument)
    gate = None if text is None else str(Gate.parse(text) or "")
    found = list(find_steerings(path, model))
    return found if gate is None else [each.with_(gate=gate) for each in found], dial


def named_steerings(
    arguments: Sequence[str],
    *,
    angle: float | None = None,
    strength: float | None = None,
    may_be_off: bool = False,
    model: str | Path | None = None,
) -> tuple[tuple[Steering, ...], dict[str, float | None]]:
    """Steerings of `FILE:ANGLE@GATE` arguments and their dials: option before FILE:ANGLE before file default.

    may_be_off: a steering without any of them is off; else SteerError is raised.
    model: whose measured steerings are meant by a name that is no file, see `find_steerings`.
    """
    if angle is not None and strength is not None:
        raise SteerError("expected an angle or a strength, got both")
    steerings: list[Steering] = []
    dials: dict[str, float | None] = {}
    for argument in arguments:
        found, dial = load_argument(argument, model)
        for each in found:
            steerings.append(each)
            if strength is not None:
                dials[each.name] = each.at_strength(strength)
            elif dial is None and angle is None and (each.has_default or not may_be_off):
                dials[each.name] = each.default_dial()
            else:
                dials[each.name] = dial
    loaded = load_steerings(steerings)
    if angle is not None:
        if len(loaded) != 1:
            raise SteerError(f"--angle is for one steering, got {len(loaded)}; write -s FILE:ANGLE for each")
        dials[loaded[0].name] = angle
    return loaded, dials
