"""The package's front: its public names, and what naming them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edge_steer


def test_dir_lists_the_public_names_and_each_can_be_had() -> None:
    assert {"SteeredLlama", "Steering", "SteerError", "__version__"} <= set(dir(edge_steer))
    assert all(getattr(edge_steer, name) is not None for name in dir(edge_steer))
    with pytest.raises(AttributeError, match="'steerer'"):
        _ = edge_steer.steerer


def test_the_import_loads_nothing_slow() -> None:
    slow = "{'numpy', 'llama_cpp', 'gguf', 'torch'}"
    program = f"import edge_steer, sys; dir(edge_steer); print(*{slow} & sys.modules.keys())"
    assert not subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.strip()
