"""What llama.cpp says. llama-cpp-python shows it or swallows it; the reason why a model does not load is in it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import llama_cpp

_ERROR = 4  # ggml_log_level: none, debug, info, warn, error, continued


@contextmanager
def llama_errors(heard: Callable[[bytes], object] | None = None) -> Iterator[list[str]]:
    """The lines that llama.cpp calls errors while the block runs, as they come.

    heard: told all else that it says, in place of whoever listened; None: whoever listened hears everything.
    """
    lines: list[str] = []
    listener, its_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(listener), ctypes.byref(its_data))

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            lines.append(text.decode(errors="replace").strip())
        elif heard is not None:
            heard(text)
        if heard is None and listener:
            listener(level, text, its_data)

    llama_cpp.llama_log_set(listen, ctypes.c_void_p())
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(listener, its_data)


def reason(lines: list[str]) -> str | None:
    """The first of llama.cpp's lines as a reason, without the function that says it and at most 200 characters."""
    if not lines:
        return None
    said = re.sub(r"^\w+: ", "", " ".join(lines[0].split()))
    shown = said.removeprefix("error loading model: ").encode("unicode_escape").decode()
    return shown[:200]
