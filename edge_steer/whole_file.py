"""A file that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_steer.errors import SteerError


@contextmanager
def whole_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` where the block ends well and is removed where it does not.

    A link stays one: what it leads to is written.

    Raises SteerError if `path` exists and `force` is not given, where it is no regular file (a device must not be
    replaced), and where the system refuses to write.
    """
    path = path.resolve() if path.is_symlink() else path
    part = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        if path.exists() and not path.is_file():
            raise SteerError(f"expected a file to write at {path}, got a folder or a device; give another path")
        if path.exists() and not force:
            raise SteerError(f"{path} exists; give --force to replace it")
        yield part
        os.replace(part, path)
    except OSError as error:
        why = error.strerror or error
        raise SteerError(f"cannot write {path}: {why}; check the folder and its free space") from error
    finally:
        # Where even this fails, the folder is gone or closed to us, and the first error says so.
        with suppress(OSError):
            part.unlink(missing_ok=True)
