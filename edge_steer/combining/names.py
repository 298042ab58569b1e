"""The names of an expression, bound on the command line: `NAME=FILE:ANGLE`, or a file by its steerings' own names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_steer.errors import SteerError, quote
from edge_steer.runtime.dials import split_dial
from edge_steer.sharing.find import find_steerings
from edge_steer.steering import Steering


def bind_names(arguments: Sequence[str], model: str | None = None) -> tuple[dict[str, Steering], dict[str, float]]:
    """Steerings and the dials given with them, by name.

    model: whose measured steerings are meant by a name without a file. Raises SteerError where a name is none, stands
    twice, or is for a file of several steerings.
    """
    steerings: dict[str, Steering] = {}
    dials: dict[str, float] = {}
    for argument in arguments:
        given, equals, file = argument.partition("=")
        if not equals or not given.isidentifier() or Path(split_dial(argument)[0]).is_file():
            given, file = "", argument
        path, dial = split_dial(file)
        found = find_steerings(path, model)
        if given and len(found) != 1:
            names = ", ".join(quote(each.name) for each in found[:5])
            raise SteerError(
                f"expected one steering in {path} to call {given}, got {len(found)} ({names}); use -s {path}"
            )
        for each in found:
            name = given or each.name
            if not name.isidentifier():
                raise SteerError(f"expected a name of letters and digits, got {quote(name)}; write -s NAME={path}")
            if name in steerings:
                raise SteerError(f"two steerings are called {name!r}; write -s NAME={path} for one of them")
            steerings[name] = each
            if dial is not None:
                dials[name] = dial
    return steerings, dials
