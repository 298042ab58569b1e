"""What tests share: the two small real models, fetched once into the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_steer import SteerError
from edge_steer.fetch import resolve


def _fetched(name: str) -> Path:
    try:
        return resolve(name, fetch=True)
    except SteerError as error:
        pytest.skip(f"cannot test on the real model {name}: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return _fetched("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270M base, Q4_K_M."""
    return _fetched("gemma3-270m")
