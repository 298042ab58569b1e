"""What an adapter says of itself, beside llama.cpp's own keys: which steering it is of, and which part of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGUFValueType

from edge_steer.errors import FormatError, SteerError
from edge_steer.export.gguf_bytes import text
from edge_steer.gguf_metadata import Value, read_gguf
from edge_steer.steering import Steering

COS, SIN, WHOLE = "cos", "sin", "whole"
_PREFIX = "edge_steer.adapter."


@dataclass(frozen=True)
class AdapterLabel:
    """part: COS or SIN of a pair, or WHOLE for scale 1. dial: where a whole one stands; NaN for a pair."""

    part: str
    steering: str
    fingerprint: str
    dial: float = math.nan

    def metadata(self) -> dict[str, Value]:
        """As keys of the adapter's file."""
        found = {
            f"{_PREFIX}part": text(self.part),
            f"{_PREFIX}steering": text(self.steering),
            f"{_PREFIX}fingerprint": text(self.fingerprint),
        }
        if self.part == WHOLE:
            found[f"{_PREFIX}dial"] = Value(GGUFValueType.FLOAT32, self.dial)
        return found


def label(part: str, steering: Steering, dial: float = math.nan) -> AdapterLabel:
    return AdapterLabel(part, steering.name, steering.fingerprint, dial)


def read_label(path: Path) -> AdapterLabel | None:
    """The label of an adapter; None where the file cannot be read here, or has none."""
    try:
        values = read_gguf(path, lambda key: key.startswith(_PREFIX)).values
    except (FormatError, SteerError, OSError):
        return None
    part, steering, fingerprint = (
        values[f"{_PREFIX}{key}"].value if f"{_PREFIX}{key}" in values else None
        for key in ("part", "steering", "fingerprint")
    )
    dial = values.get(f"{_PREFIX}dial", Value(GGUFValueType.FLOAT32, math.nan))
    if part not in (COS, SIN, WHOLE) or not isinstance(steering, str) or not isinstance(fingerprint, str):
        return None
    return AdapterLabel(
        part, steering, fingerprint, float(dial.value) if dial.type == GGUFValueType.FLOAT32 else math.nan
    )
