"""JSON files as models and calibrations bring them: read within bounds, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_steer.errors import FormatError, SteerError

# The largest tokenizers have some 40 MB.
MOST_BYTES = 128 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`.

    Raises SteerError if it cannot be read, FormatError where it is no JSON object or larger than MOST_BYTES.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise SteerError(f"{path}: no such file; give a Hugging Face directory as save_pretrained writes it") from None
    except OSError as error:
        raise SteerError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    if len(data) > MOST_BYTES:
        raise FormatError(f"{path}: expected JSON of at most {MOST_BYTES >> 20} MB, got more; download the file again")
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON, got {error}; download the file again") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(found).__name__}; download the file again")
    return found
