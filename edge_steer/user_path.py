"""Paths as people write them, `~` and all."""

from __future__ import annotations

from pathlib import Path

from edge_steer.errors import SteerError


def user_path(written: str | Path) -> Path:
    """The path, `~` and `~name` expanded. Raises SteerError if that user has no home folder that the system knows.

    A container's user may have none, and no HOME either.
    """
    try:
        return Path(written).expanduser()
    except RuntimeError:
        raise SteerError(f"expected a path, got {str(written)!r}, whose home folder is not known; set HOME") from None
