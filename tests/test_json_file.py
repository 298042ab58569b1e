"""A JSON file is an object of bounded size, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_steer.errors import FormatError, SteerError
from edge_steer.json_file import MOST_BYTES, read_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[]", "expected a JSON object, got list"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_a_terabyte_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match=f"at most {MOST_BYTES >> 20} MB"):
        read_json(path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.json", "no such file"), (tmp_path, "cannot read")):
        with pytest.raises(SteerError, match=message):
            read_json(path)


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
