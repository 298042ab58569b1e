"""What tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _model(name: str) -> Path:
    folder = os.environ.get("EDGE_STEER_TEST_MODELS")
    if folder is None or not (path := Path(folder) / name).is_file():
        pytest.skip(f"EDGE_STEER_TEST_MODELS names no folder with {name}")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return _model("smollm2.gguf")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270M base, Q4_K_M."""
    return _model("gemma3.gguf")
