"""Errors a user can cause and cure. The command line prints one line of each and exits 1."""

from __future__ import annotations


class SteerError(Exception):
    """Base of all errors of edge-steer: the message says what was expected, what was found, and what to do."""


class FormatError(SteerError):
    """A file is malformed, truncated, hostile, or of a version this release does not read."""


class MismatchError(SteerError):
    """A steering does not fit the model it was given to."""


class NoEffectError(SteerError):
    """A steering would act nowhere."""
