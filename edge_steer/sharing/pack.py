"""A pack: steering files with a card, in a folder or a `.zip`. One that is read may be hostile.

Nothing of an archive is unpacked to where it says: of its members only those are read that the card names, each up to
the size that the card names, and each must have the card's hash.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.export.whole_folder import whole_folder
from edge_steer.sharing.card import (
    CARD,
    MOST_CARD,
    NAME,
    README,
    Card,
    CardEntry,
    card_fields,
    check_file,
    load_checked,
    parse_card,
    readme,
)
from edge_steer.steering import Steering
from edge_steer.whole_file import whole_file

# The list of members that an archive ends in; a thousand of them, not a million that cost a gigabyte to list.
_MOST_LIST = 1 << 18
# What zipfile raises at an archive that is none; OSError where it says to look before its beginning.
_BROKEN = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError, struct.error,
    OverflowError,
)  # fmt: skip
_END = struct.Struct("<4s4H2LH")
_SAME_DATE = (1980, 1, 1, 0, 0, 0)  # the same steerings make the same archive


def write_pack(
    steerings: Sequence[Steering],
    path: Path,
    *,
    licence: str | None = None,
    results: Mapping[str, Any] | None = None,
    sources: Sequence[Path] = (),
    force: bool = False,
) -> None:
    """Write steerings for one model with their card: a `.zip` where `path` ends so, else a folder; whole or not at all.

    results: what was measured with each, by its name, as JSON has it. sources: files that a folder written over must
    not hold. Raises SteerError if `path` exists and `force` is not given, for steerings of two models, of one name, or
    of a name that is no file's.
    """
    _check_packable(steerings, results or {})
    files = {each.name: _file_bytes(each) for each in steerings}
    card = card_fields(steerings, files, licence, results or {})
    contents = {
        CARD: (json.dumps(card, ensure_ascii=False, indent=1) + "\n").encode(),
        README: readme(card, path.stem).encode(),
        **{f"{name}.gguf": data for name, data in files.items()},
    }
    if path.suffix.lower() == ".zip":
        with whole_file(path, force=force) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in contents.items():
                archive.writestr(zipfile.ZipInfo(name, _SAME_DATE), data, zipfile.ZIP_DEFLATED)
        return
    inside = next((each for each in sources if each.resolve().is_relative_to(path.resolve())), None)
    with whole_folder(path, inside, force=force) as folder:
        for name, data in contents.items():
            (folder / name).write_bytes(data)


def _check_packable(steerings: Sequence[Steering], results: Mapping[str, Any]) -> None:
    if not steerings:
        raise SteerError("expected at least one steering to pack, got none")
    names = [each.name for each in steerings]
    for each in steerings:
        if not re.fullmatch(NAME, each.name):
            raise SteerError(
                f"expected a name of letters, digits, - and _, which is the file's too, got {quote(each.name)}; "
                "calibrate it again with another --name"
            )
        if each.base != steerings[0].base:
            raise SteerError(
                f"expected steerings for one model in a pack, got {names[0]!r} for {steerings[0].base.name!r} and "
                f"{each.name!r} for {each.base.name!r}; make a pack for each"
            )
    if len({name.lower() for name in names}) != len(names):
        raise SteerError(f"expected steerings of different names in a pack, got {', '.join(names)}; rename one")
    if unknown := [name for name in results if name not in names]:
        raise SteerError(f"expected results for {', '.join(names)}, got some for {quote(unknown[0])}")


def _file_bytes(steering: Steering) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steering.gguf"
        steering.save(file)
        return file.read_bytes()


def read_pack(path: Path, name: str | None = None) -> list[Steering]:
    """The steering called `name` in the `.zip` pack at `path`; where none is named, the only one.

    Raises FormatError if it is no pack, or a file in it is not what its card says.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise SteerError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    with file:
        entry, card, data = _read_entry(file, path, name)
    check_file(entry, data, str(path))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "steering.gguf"
        copy.write_bytes(data)
        return load_checked(card, entry, copy, str(path))


def _read_entry(file: BinaryIO, path: Path, name: str | None) -> tuple[CardEntry, Card, bytes]:
    try:
        _check_list(path, file)
        with zipfile.ZipFile(file) as archive:
            card = parse_card(_member(archive, CARD, MOST_CARD, path), str(path))
            entry = card.choose(name, str(path))
            return entry, card, _member(archive, entry.file, entry.size, path)
    except _BROKEN:
        raise FormatError(
            f"{path}: expected a pack made by `edge-steer pack`, got something else; fetch it again"
        ) from None


def _check_list(path: Path, file: BinaryIO) -> None:
    """The end of an archive says how long the list of its members is: zipfile would read it whatever its length."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END.size - 20))
    tail = file.read()
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise zipfile.BadZipFile
    length = _END.unpack(tail[-_END.size :])[5]
    # A locator of the 64-bit form before it would overrule that length.
    if length > _MOST_LIST or tail[:4] == b"PK\x06\x07":
        raise FormatError(f"{path}: expected a pack of some files, got a list of members too long for one")


def _member(archive: zipfile.ZipFile, name: str, most: int, path: Path) -> bytes:
    """A member of at most `most` bytes, read no further. Raises FormatError where there is none."""
    members = [each for each in archive.infolist() if each.filename == name]
    if len(members) != 1:
        got = "none" if not members else f"{len(members)}"
        raise FormatError(f"{path}: expected {name} in the pack, got {got}; fetch it again")
    if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or members[0].file_size > most:
        raise FormatError(f"{path}: expected {name} of at most {most} bytes, stored or deflated, got another")
    with archive.open(members[0]) as file:
        return file.read(most + 1)
