"""Errors a user can cause and cure. The command line prints one line of each and exits 1."""

from __future__ import annotations

_SHOWN = 80


def quote(value: object, most: int = _SHOWN) -> str:
    """What a file holds, short enough for a message of one line, whatever it is: at most `most` characters."""
    try:
        text = repr(value[:most] if isinstance(value, str) else value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    text = " ".join(line.strip() for line in text.splitlines())  # an array is shown on several
    return text if len(text) <= most else f"{text[: most - 1]}…"


class SteerError(Exception):
    """Base of all errors of edge-steer: the message says what was expected, what was found, and what to do."""


class FormatError(SteerError):
    """A file is malformed, truncated, hostile, or of a version this release does not read."""


class MismatchError(SteerError):
    """A steering does not fit the model it was given to."""


class NoEffectError(SteerError):
    """A steering would act nowhere."""
