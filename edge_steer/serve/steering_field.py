"""The field `steering` of a request, the dials in a model's name, and the list of what may stand there.

A request names steerings that the server holds, never a file. Dials are the steering's own unit; None is off.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edge_steer.errors import SteerError, quote
from edge_steer.serve.gate_field import split_alias, split_gates
from edge_steer.steering import Steering

Dial = float | None
FIELD = "steering"
OFF = "off"
_LONGEST = 2000  # characters of a text of dials
# No dial means more than these, and what float32 makes infinite is far beyond.
_LARGEST = {"degrees": 360.0, "coefficient": 1000.0}
_FORMS = 'expected dials such as {"happy": 8}, {"happy": {"strength": 0.5}} or "happy:8,formal:-4@response"'


class BadRequest(ValueError):
    """A field of a request cannot be taken; `param` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


def parse_steering(value: Any, steerings: Sequence[Steering], param: str = FIELD) -> dict[str, Dial]:
    """The dial of every steering, in order; one that `value` does not name is off.

    value: an object, a text such as "happy:8,formal" (a name alone stands at its file's default), "", "off" or None.
    Raises BadRequest where it names what is not there, or a dial that cannot be set.
    """
    return {**{each.name: None for each in steerings}, **parse_named(value, steerings, param)}


def parse_named(value: Any, steerings: Sequence[Steering], param: str = FIELD) -> dict[str, Dial]:
    """As parse_steering, of the steerings that `value` names alone; "off" and None name all."""
    by_name = {each.name: each for each in steerings}
    value, _ = split_gates(value)
    match value:
        case None:
            return dict.fromkeys(by_name)
        case str():
            return _from_text(value, by_name, param)
        case dict():
            return {name: _dial(given, _find(name, by_name, param), param) for name, given in value.items()}
    raise BadRequest(param, f"{_FORMS}, got {quote(value)}")


def parse_alias(
    model: str, steerings: Sequence[Steering], served: str | None = None
) -> tuple[str, dict[str, Dial] | None]:
    """ "MODEL@happy:8" as the model and the dials, which are None where the name holds none.

    served: the model's own name, which may hold an @. "MODEL@off" and "MODEL@" are all off.
    """
    if model == served or "@" not in model:
        return model, None
    if served is not None and model.startswith(f"{served}@"):
        base, dials = served, model.removeprefix(f"{served}@")
    else:
        base, dials = split_alias(model)
    return base, parse_steering(dials, steerings, "model")


def aliases(model: str, steerings: Sequence[Steering]) -> list[str]:
    """Names of the model with dials: all off, and each steering at half and at the whole of its range, either way."""
    found = [f"{model}@{OFF}"] if steerings else []
    for each in steerings:
        if "," in each.name:  # a text of dials could not name it
            continue
        if each.operator == "ablation":
            found.append(f"{model}@{each.name}")
            continue
        low, high = each.angle_min, each.angle_max
        stops = (low, low / 2, high / 2, high)
        dials = dict.fromkeys(f"{stop:.4g}" for stop in stops if not math.isnan(stop) and stop)
        found += [f"{model}@{each.name}:{dial}" for dial in dials]
    return found


def describe(
    steerings: Sequence[Steering],
    dials: Mapping[str, Dial],
    model: str = "",
    gates: Mapping[str, Any] | None = None,
    readable: Collection[str] = (),
) -> dict[str, Any]:
    """The body of GET /v1/steering. dials, gates: where the steerings stand for a request that names none. readable:
    names of those that tokens can be read by."""
    described = [
        {**_describe(each, dials.get(each.name), (gates or {}).get(each.name)), "readable": each.name in readable}
        for each in steerings
    ]
    return {"model": model, "unit": None, "steerings": described}


def round_dial(dial: Dial) -> Dial:
    """A dial as people read it: a file's float32 holds further digits, which are no one's."""
    return None if dial is None or math.isnan(dial) else float(f"{dial:.6g}")


def _describe(steering: Steering, dial: Dial, gate: Any) -> dict[str, Any]:
    return {
        "name": steering.name,
        "description": steering.description,
        "negative_name": "" if steering.negative == "negative" else steering.negative,
        "positive_name": "" if steering.positive == "positive" else steering.positive,
        "unit": _unit(steering),
        "operator": steering.operator,
        "default": round_dial(dial),
        "when": None if gate is None else str(gate),
        "file_default": round_dial(steering.default_dial()) if steering.has_default else None,
        "min": round_dial(steering.angle_min),
        "max": round_dial(steering.angle_max),
        "provisional": steering.provisional,
    }


def _unit(steering: Steering) -> str:
    return "degrees" if steering.operator in ("selective", "standard", "adaptive") else "coefficient"


def _from_text(text: str, by_name: Mapping[str, Steering], param: str) -> dict[str, Dial]:
    if len(text) > _LONGEST:
        raise BadRequest(param, f"expected at most {_LONGEST} characters of dials, got {len(text)}")
    if not text.strip() or (text.strip() == OFF and OFF not in by_name):
        return dict.fromkeys(by_name)
    found: dict[str, Dial] = {}
    for part in map(str.strip, text.split(",")):
        name, colon, number = (part, "", "") if part in by_name else part.rpartition(":")
        steering = _find(name.strip() if colon else part, by_name, param)
        if steering.name in found:
            raise BadRequest(param, f"expected {quote(steering.name)} once, got it twice")
        if not colon:
            found[steering.name] = _default(steering, param)
        else:
            found[steering.name] = None if number.strip() == OFF else _number(number, steering, param)
    return found


def _find(name: str, by_name: Mapping[str, Steering], param: str) -> Steering:
    if name not in by_name:
        raise BadRequest(param, f"expected a steering among {', '.join(by_name) or '(none)'}, got {quote(name)}")
    return by_name[name]


def _dial(given: Any, steering: Steering, param: str) -> Dial:
    match given:
        case None:
            return None
        case {"strength": strength} if len(given) == 1:
            return _at_strength(strength, steering, param)
        case {"angle": None | int() | float()} if len(given) == 1:
            return _dial(given["angle"], steering, param)
        case {} if not given:
            return _default(steering, param)
        case bool() | dict() | list() | str():
            raise BadRequest(param, f"{_FORMS}, got {quote(given)} for {quote(steering.name)}")
    return _number(given, steering, param)


def _number(given: Any, steering: Steering, param: str) -> float:
    unit = _unit(steering)
    most = _LARGEST[unit]
    try:
        dial = float(given)
    except (ValueError, OverflowError):
        dial = math.nan
    if not -most <= dial <= most:  # nor NaN
        wanted = f"a number from {-most:g} to {most:g} ({unit})"
        raise BadRequest(param, f"expected {wanted} for {quote(steering.name)}, got {quote(given)}")
    return dial


def _at_strength(strength: Any, steering: Steering, param: str) -> float:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise BadRequest(param, f"expected a strength from -1 to 1 for {quote(steering.name)}, got {quote(strength)}")
    try:
        return steering.at_strength(strength)
    except SteerError as error:
        raise BadRequest(param, str(error)) from None


def _default(steering: Steering, param: str) -> float:
    try:
        return steering.default_dial()
    except SteerError as error:
        raise BadRequest(param, str(error)) from None
