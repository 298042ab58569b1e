"""What `-s` may name: a steering file, a steering of a pack, of one on the hub, or one that ships for the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edge_steer.errors import SteerError, quote
from edge_steer.sharing.card import NAME
from edge_steer.steering import Steering
from edge_steer.user_path import user_path

if TYPE_CHECKING:
    from edge_steer.combining.expression import Expression


def find_steerings(given: str | Path, model: str | Path | None = None) -> list[Steering]:
    """The steerings that `given` names: a file that exists wins.

    given: a steering file; `PACK.zip/NAME`, or `PACK.zip` of one steering; `hub:USER/REPO/NAME`; or a NAME alone, for
    NAME.gguf here, else the measured one that ships for `model`; or an expression over such names, as `combine` takes
    it. model: a .gguf file or a name from
    `edge-steer models`. Raises SteerError where there is none, FormatError where a file is malformed.
    """
    written = str(given)
    if written.startswith("hub:") and not Path(written).is_file():
        from edge_steer.sharing.hub import fetch_steerings

        return fetch_steerings(written)
    path = user_path(given)
    if path.is_file() and path.suffix.lower() == ".zip":
        from edge_steer.sharing.pack import read_pack

        return read_pack(path)
    if path.parent.is_file() and path.parent.suffix.lower() == ".zip":
        from edge_steer.sharing.pack import read_pack

        return read_pack(path.parent, path.name)
    if not path.exists() and re.fullmatch(NAME, written):
        path = Path(f"{written}.gguf")
        if not path.is_file():
            if model is None:
                raise SteerError(f"expected a steering file, got {quote(written)}: no such file; give its path")
            from edge_steer.sharing.shipped import shipped_file

            path = shipped_file(written, model)
    elif not path.exists() and (expression := _expression(written)):
        return [_combine(expression, model)]
    return Steering.load_all(path)


def _expression(written: str) -> Expression | None:
    from edge_steer.combining.expression import parse

    try:
        return parse(written)
    except SteerError:
        return None  # a path, then: the error that follows tells of that


def _combine(expression: Expression, model: str | Path | None) -> Steering:
    import warnings

    from edge_steer.combining import combine

    steerings = {}
    for name in expression.names:
        found = find_steerings(name, model)
        if len(found) != 1:
            raise SteerError(f"expected one steering in {name}.gguf for {expression.text!r}, got {len(found)}")
        steerings[name] = found[0]
    return combine(expression.text, steerings, note=lambda line: warnings.warn(line, stacklevel=4))
