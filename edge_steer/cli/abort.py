"""Where ggml ends the process, by an assertion that a malformed model fails: one line and exit code 1, no core dump."""

from __future__ import annotations

import os
from functools import cache


@cache
def tell_of_aborts() -> object:
    """From now on ggml's last words are the program's error. For a program of our own only: it ends there.

    Returns what ggml calls, which the cache keeps alive.
    """
    from edge_steer import ggml

    stderr = os.dup(2)  # llama-cpp-python closes standard error while a model loads

    def end(message: bytes) -> None:
        said = " ".join(message.decode(errors="replace").split())[-200:]
        os.write(stderr, f"Error: llama.cpp stopped: {said}; is the model whole? fetch or convert it again\n".encode())
        os._exit(1)

    callback = ggml.AbortCallback(end)
    ggml.base().ggml_set_abort_callback(callback)
    return callback
