"""llama.cpp's own quantizer, for every type that it names."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from edge_steer.errors import SteerError
from edge_steer.runtime.llama_log import llama_errors

_PREFIXES = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
_MAX_BUFFER = 1 << 29  # bytes of one weight's rows at a time; llama.cpp's own bound is 8 GiB
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


def file_types() -> dict[str, int]:
    """Every type of file that this llama.cpp knows, by name."""
    import llama_cpp

    return {
        name.removeprefix(prefix): number
        for name, number in vars(llama_cpp).items()
        for prefix in _PREFIXES
        if name.startswith(prefix)
    }


def file_type(name: str) -> int:
    """llama.cpp's number for the type called `name`. Raises SteerError that lists all."""
    known = file_types()
    found = known.get(_ALIASES.get(name.upper(), name.upper()))
    if found is None:
        raise SteerError(f"expected a type among {', '.join(sorted(known))}, got {name!r}")
    return found


def quantize_file(
    source: Path,
    target: Path,
    name: str,
    *,
    threads: int | None = None,
    step: Callable[[int], None] = lambda steps: None,
) -> None:
    """Write the GGUF `source` (F32, F16 or BF16) as `target` of the type `name`.

    threads: None for all. step: called with 1 at every tensor.
    Raises SteerError, with what llama.cpp said, where it refuses; it may then leave a part of `target` behind.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type(name)
    parameters.nthread = threads or 0
    parameters.max_buf_size = _MAX_BUFFER

    def count(text: bytes) -> None:
        if text.startswith(b"["):  # "[  12/ 272] blk.1.attn_q.weight …"
            step(1)

    with llama_errors(count) as said:
        failed = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(parameters))
    if failed:
        raise SteerError(f"llama.cpp cannot quantize this model to {name}: {' '.join(said) or 'no reason given'}")
