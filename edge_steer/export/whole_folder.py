"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_steer.errors import SteerError


@contextmanager
def whole_folder(path: Path, source: Path | None = None, *, force: bool = False) -> Iterator[Path]:
    """A new folder beside `path` to write to; it becomes `path` where the block ends well, else it is removed.

    Raises SteerError if `path` exists and `force` is not given, where it is a file or holds `source`, and where the
    system refuses to write. With `force`, a folder that is there is replaced as a whole.
    """
    path = Path(os.path.normpath(path))
    part = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    old = part.with_suffix(".old")
    try:
        if path.exists() and not path.is_dir():
            raise SteerError(f"expected a folder to write at {path}, got a file; give another path")
        if source is not None and path.exists() and source.resolve().is_relative_to(path.resolve()):
            raise SteerError(f"{path} is or holds what is read; give another -o")
        if path.exists() and not force:
            raise SteerError(f"{path} exists; give --force to replace it")
        part.mkdir()
        yield part
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    except OSError as error:
        raise SteerError(
            f"cannot write {path}: {error.strerror or error}; check the folder and its free space"
        ) from error
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
