"""What `-s` may name: a steering file, a steering of a pack, of one on the hub, or one that ships for the model."""

from __future__ import annotations

import re
from pathlib import Path

from edge_steer.errors import SteerError, shown
from edge_steer.sharing.card import NAME
from edge_steer.steering import Steering
from edge_steer.user_path import user_path


def find_steerings(given: str | Path, model: str | Path | None = None) -> list[Steering]:
    """The steerings that `given` names: a file that exists wins.

    given: a steering file; `PACK.zip/NAME`, or `PACK.zip` of one steering; `hub:USER/REPO/NAME`; or a NAME alone, for
    NAME.gguf here, else the measured one that ships for `model`. model: a .gguf file or a name from
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
                raise SteerError(f"expected a steering file, got {shown(written)}: no such file; give its path")
            from edge_steer.sharing.shipped import shipped_file

            path = shipped_file(written, model)
    return Steering.load_all(path)
