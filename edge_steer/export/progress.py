"""How an export reports how far it is: `with progress("rotating", total) as step: step(1)`. The CLI draws a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Reports nothing."""
    yield lambda steps: None
