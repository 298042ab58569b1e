"""Where a verb writes, looked at before its work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def output_path(output: str, force: bool, *inputs: str | Path | None) -> Path:
    """Where to write, looked at before the work is done.

    Raises SteerError if it would be refused afterwards, or would destroy one of the `inputs`.
    """
    from pathlib import Path

    from edge_steer.errors import SteerError

    path = Path(output)
    if path.exists() and not path.is_file():
        raise SteerError(f"expected a file to write at {path}, got a folder or a device; give another path")
    if path.exists() and not force:
        raise SteerError(f"{path} exists; give --force to replace it")
    check_not_an_input([path], *inputs)
    if not os.access(path.parent, os.W_OK):
        raise SteerError(f"cannot write {path}: its folder is missing or not writable; give another path")
    return path


def check_not_an_input(outputs: Sequence[Path], *inputs: str | Path | None) -> None:
    """Raise SteerError where writing one of `outputs` would replace what is read, by whatever name or link.

    A known model's name stands for its file; None and what is no file are passed over.
    """
    from pathlib import Path

    from edge_steer.errors import SteerError
    from edge_steer.registry import cached_path, entries

    known = {each.name for each in entries()}
    for given in inputs:
        path = None if given is None else cached_path(str(given)) if str(given) in known else Path(given)
        if path is None or not path.exists():
            continue
        for output in outputs:
            if output.exists() and output.samefile(path):
                raise SteerError(f"{output} is {given}, which is read; give another -o")
