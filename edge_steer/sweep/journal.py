"""What a sweep has measured so far: JSON lines, written as they come, read back when it goes on.

The first line says what was measured on what; each other line is one measurement at one position of one curve.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from edge_steer.errors import SteerError
from edge_steer.sweep.measurements import RawMeasurement
from edge_steer.whole_file import whole_file


class JournalKey(NamedTuple):
    """curve: the steering's fingerprint; None where the measurement is the same for all, as everything off is that does
    not look along a direction. dial: None is off."""

    curve: str | None
    dial: float | None
    part: str


class Journal:
    """Raw measurements by key, in memory and in the file. Made by `open`."""

    def __init__(self, path: Path, measurements: dict[JournalKey, RawMeasurement]) -> None:
        self._path, self._measurements = path, measurements

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any], *, force: bool = False) -> Journal:
        """The journal at `path`, a new one where there is none or `force` is given.

        Raises SteerError if it was written under other settings, or is no journal.
        """
        if force or not path.exists():
            with whole_file(path, force=force) as part:
                part.write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")
            return cls(path, {})
        text = path.read_text(encoding="utf-8", errors="replace")
        # A line that a stop cut short: what it held is measured again.
        whole = text[: text.rfind("\n") + 1]
        before, measurements = _parse(whole, path)
        if before != settings:
            differing = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
            raise SteerError(
                f"{path.parent} holds a sweep with another {', '.join(differing)}; give another -o folder, "
                "or --force to start anew"
            )
        if whole != text:
            with whole_file(path, force=True) as part:
                part.write_text(whole, encoding="utf-8")
        return cls(path, measurements)

    def __contains__(self, key: JournalKey) -> bool:
        return key in self._measurements

    def __getitem__(self, key: JournalKey) -> RawMeasurement:
        return self._measurements[key]

    def __len__(self) -> int:
        return len(self._measurements)

    def put(self, key: JournalKey, value: RawMeasurement) -> None:
        """Remember a measurement; on return it is in the file."""
        line = json.dumps({**key._asdict(), "value": value}, ensure_ascii=False)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise SteerError(f"cannot write {self._path}: {error.strerror or error}; make room and run again") from None
        self._measurements[key] = value

    def dials(self, curve: str) -> list[float]:
        """The positions of a curve at which something was measured, sorted."""
        return sorted({key.dial for key in self._measurements if key.curve == curve and key.dial is not None})


def _parse(text: str, path: Path) -> tuple[dict[str, Any], dict[JournalKey, RawMeasurement]]:
    """The settings and the measurements in a journal's lines."""
    try:
        settings, *records = map(json.loads, text.splitlines())
        if not isinstance(settings, dict):
            raise ValueError("the first line is no object")
        return settings, {JournalKey(each["curve"], each["dial"], each["part"]): each["value"] for each in records}
    except (ValueError, KeyError, TypeError):
        raise SteerError(f"{path}: expected a sweep's journal, got something else; give another -o folder") from None
