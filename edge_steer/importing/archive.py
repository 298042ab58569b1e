"""What torch is given to unpickle: an archive as torch.save writes it, no larger than it looks.

torch.load with weights_only runs no code, but it unpacks whatever an archive claims (half a megabyte became two
gigabytes) and hashes what the pickle nests: a tuple of the same tuple twice, forty deep, is 2^40 steps in 600 bytes.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

from edge_steer.errors import FormatError

_LARGEST_PICKLE = 1 << 20  # a hundred kilobytes name the tensors of the largest models
_PROTOCOL = 2  # torch.save's
# What a pickle may fetch a second time: names and texts at will, as they hold nothing; a built object (a tensor that is
# in two places) so few times that what it may hold cannot grow beyond bounds.
_PLAIN = {"GLOBAL", "BINUNICODE"}
_MOST_SHARED = 8


def check_archive(path: Path) -> None:
    """Raise FormatError where the file is not an archive of torch.save, or would be more than it is once unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(each.compress_type != zipfile.ZIP_STORED for each in members):
                raise FormatError(f"{path}: expected an archive as torch.save writes it, got a compressed one")
            if sum(each.file_size for each in members) > path.stat().st_size:
                raise FormatError(f"{path}: expected an archive as torch.save writes it, got members that overlap")
            for each in members:
                if each.filename.endswith(".pkl"):
                    if each.file_size > _LARGEST_PICKLE:
                        raise FormatError(f"{path}: expected at most {_LARGEST_PICKLE} bytes of names in it")
                    _check_pickle(path, archive.read(each))
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, OverflowError, struct.error):
        raise FormatError(
            f"{path}: expected an archive as torch.save writes it, got something else, or one cut short; fetch it again"
        ) from None


def _check_pickle(path: Path, data: bytes) -> None:
    memo: dict[Any, str] = {}
    before, shared = "", 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.proto > _PROTOCOL:
            raise FormatError(f"{path}: expected a pickle of protocol {_PROTOCOL}, got {opcode.name}")
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = before
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            kind = memo.get(argument, "")
            shared += kind == "REDUCE"
            if kind not in _PLAIN and (kind != "REDUCE" or shared > _MOST_SHARED):
                raise FormatError(f"{path}: expected a calibration of tensors and names, got what holds itself again")
        elif opcode.name in ("GET", "PUT", "DUP"):
            raise FormatError(f"{path}: expected a pickle as torch.save writes it, got {opcode.name}")
        before = opcode.name
