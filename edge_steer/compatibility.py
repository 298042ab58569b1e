"""The release of llama-cpp-python that edge-steer is built on."""

from __future__ import annotations

from edge_steer.errors import MismatchError

TESTED = "0.3.36"
INSTALL = f"pip install llama-cpp-python=={TESTED}"


def changed(expected: str, found: str) -> MismatchError:
    """What to raise where llama-cpp-python, or the llama.cpp that it brings, is not as edge-steer knows it."""
    import llama_cpp

    return MismatchError(f"llama-cpp-python {llama_cpp.__version__}: expected {expected}, got {found}; {INSTALL}")


def check() -> None:
    """Raise MismatchError where another release is installed."""
    import llama_cpp

    if llama_cpp.__version__ != TESTED:
        raise changed(f"release {TESTED}", "another")
