"""`edge_steer.calibrate`: from two lists of prompts, or a preset, to a steering that turns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")


import edge_steer
from edge_steer.prompts import Prompt

THREAD: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}


def test_two_lists_of_prompts_are_enough(model: Path, tmp_path: Path) -> None:
    happy = edge_steer.calibrate(
        model, [f"I love {n}." for n in range(12)], [Prompt(f"I hate {n}!") for n in range(12)], name="happy", **THREAD
    )
    assert happy.name == "happy"
    assert happy.has_default
    assert happy.angle_min < 0 < happy.angle_max
    happy.save(tmp_path / "happy.gguf")
    llm = edge_steer.SteeredLlama(model, steering=tmp_path / "happy.gguf", **THREAD)
    assert llm.angle == happy.default_dial()


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        ((["a"],), "two lists of prompts"),
        (("I love it.", ["b"]), "two lists of prompts"),
        ((edge_steer.load_preset("sentiment"), ["b"]), "a preset alone"),
        ((["a"], ["a"]), "the two sides are the same"),
        ((["a"], []), "got no negative one"),
    ],
)
def test_what_is_no_pair_of_sides_is_one_line(model: Path, sides: tuple[object, ...], said: str) -> None:
    with pytest.raises(edge_steer.SteerError, match=re.escape(said)):
        edge_steer.calibrate(model, *sides, **THREAD)  # type: ignore[arg-type]
