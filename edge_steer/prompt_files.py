"""Prompts and probes in files: .txt, .jsonl and .csv, read within bounds, refused with file and line."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.prompts import PROMPT_KEYS, Probe, Prompt, PromptSet

LONGEST_LINE = 100_000  # characters
LARGEST_FILE = 1 << 28  # bytes: what looks like no more than a file may be a hole of a terabyte


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts in a UTF-8 file, in order; blank lines are skipped.

    .txt:   one prompt a line, blanks around it dropped.
    .jsonl: one object a line: "prompt", and if wanted "system" and "prefix" (how the answer begins).
    .csv:   a header with these names, one prompt a row; an empty cell is none.

    Raises SteerError if there is no such file, FormatError with file and line where it holds anything else.
    """
    path = Path(path)
    read = {".txt": _txt_records, ".jsonl": _jsonl_records, ".csv": _csv_records}.get(path.suffix.lower())
    if read is None:
        raise SteerError(f"{path}: expected a file named .txt, .jsonl or .csv, got {path.suffix or 'no suffix'}")
    prompts = []
    for number, record in read(path):
        _check_keys(path, number, record)
        prompts.append(replace(_make(Prompt, path, number, record), origin=f"{path}:{number}"))
    if not prompts:
        raise FormatError(f"{path}: expected prompts, got none; write at least one")
    return tuple(prompts)


def read_probes(path: str | Path) -> tuple[Probe, ...]:
    """The probes in a .jsonl file: "prompt", and an answer of each side, "positive" and "negative".

    Raises SteerError if there is no such file, FormatError with file and line where it holds anything else.
    """
    path = Path(path)
    found = tuple(_make(Probe, path, number, record) for number, record in _jsonl_records(path))
    if not found:
        raise FormatError(f"{path}: expected probes, got none; write at least one")
    return found


def prompt_set(positive_path: str | Path, negative_path: str | Path, name: str) -> PromptSet:
    """The prompts of two files as two sides, named after the files. Raises what read_prompts and PromptSet raise."""
    positive, negative = Path(positive_path), Path(negative_path)
    description = f"{positive.name} against {negative.name}"
    return PromptSet(name, description, positive.stem, negative.stem, read_prompts(positive), read_prompts(negative))


def _check_keys(path: Path, number: int, keys: Iterable[str]) -> None:
    unknown = [key for key in keys if key not in PROMPT_KEYS]
    if unknown:
        names = ", ".join(map(quote, unknown[:5]))
        raise FormatError(f"{path}:{number}: expected the keys {', '.join(PROMPT_KEYS)}, got {names}; remove it")


def _make(kind: Callable[..., Any], path: Path, number: int, record: Mapping[str, object]) -> Any:
    """kind(**record), its errors told with file and line."""
    try:
        return kind(**{"prompt": None, **record})
    except FormatError as error:
        raise FormatError(f"{path}:{number}: {error}") from None
    except TypeError:
        got = ", ".join(map(quote, record))
        raise FormatError(f"{path}:{number}: expected the keys prompt, positive, negative, got {got}") from None


def read_text(path: Path) -> str:
    """The text of a file, lines ended by \\n. Raises SteerError if none can be read, FormatError where not text."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise SteerError(f"{path}: expected a file, got {got}; check the path")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise FormatError(f"{path}: expected at most {LARGEST_FILE} bytes, got {path.stat().st_size}; split it")
        data = path.read_bytes()
    except OSError as error:
        raise SteerError(f"{path}: expected a file to read, got {error.strerror}; check its permissions") from None
    if not data:
        raise FormatError(f"{path}: expected prompts, got an empty file")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise FormatError(f"{path}:1: expected UTF-8, got UTF-16; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    nul = data.find(b"\0")
    if nul >= 0:
        number = data.count(b"\n", 0, nul) + 1
        raise FormatError(f"{path}:{number}: expected text, got a binary file (it holds a NUL byte)")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise FormatError(f"{path}:{number}: expected UTF-8, got byte {byte:#04x}; save it as UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number, from 1. (str.splitlines would also break at characters that JSON strings may hold.)"""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if len(line) > LONGEST_LINE:
            raise FormatError(f"{path}:{number}: expected a line of at most {LONGEST_LINE} characters, got {len(line)}")
        yield number, line


def _txt_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in _lines(path):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _jsonl_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_each_once)
        except FormatError as error:
            raise FormatError(f"{path}:{number}: {error}") from None
        except (ValueError, RecursionError) as error:
            # ValueError: a number of too many digits raises one that is no JSONDecodeError.
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "out of bounds"
            raise FormatError(f"{path}:{number}: expected a JSON object, got invalid JSON ({reason})") from None
        if not isinstance(record, dict):
            raise FormatError(f"{path}:{number}: expected a JSON object, got {quote(record)}")
        yield number, record


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; json takes the last of two values of one key, in silence."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise FormatError(f"expected every key once, got {quote(twice)} twice; remove one")
    return record


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    rows = csv.reader(io.StringIO("\n".join(line for _, line in _lines(path))), strict=True)
    header: list[str] | None = None
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise FormatError(f"{path}:{number}: expected a CSV row, got {error}") from None
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [cell.strip() for cell in row]
            if "prompt" not in header:
                raise FormatError(f"{path}:{number}: expected a header with a prompt column, got {quote(header)}")
            _check_keys(path, number, header)
            if len(set(header)) < len(header):
                raise FormatError(f"{path}:{number}: expected every column once, got {quote(header)}")
        elif len(row) > len(header):
            raise FormatError(
                f"{path}:{number}: expected at most {len(header)} cells, got {len(row)}; quote text with commas"
            )
        else:
            cells = dict(zip(header, row, strict=False))
            yield number, {key: cell for key, cell in cells.items() if cell.strip() or key == "prompt"}
