"""What a benchmark ran on."""

from __future__ import annotations

import ctypes

from edge_steer import ggml


def gpu_names() -> str:
    """This machine's GPUs, as llama.cpp names them."""
    describe = ggml.base().ggml_backend_dev_description
    describe.restype, describe.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    return ", ".join(describe(device).decode() for device in ggml.local_devices(ggml.GPU))
