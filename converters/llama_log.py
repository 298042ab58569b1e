"""What llama.cpp says while it works, kept off stderr."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ERROR = 4  # GGML_LOG_LEVEL_ERROR


@contextmanager
def listening(heard: Callable[[bytes], None] = lambda text: None) -> Iterator[list[str]]:
    """Collects what llama.cpp reports as errors; `heard` gets all else."""
    import llama_cpp
    from llama_cpp import _logger

    errors: list[str] = []

    def listen(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())
        else:
            heard(text)

    callback = llama_cpp.llama_log_callback(listen)  # held here: ctypes keeps none alive
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
