"""The presets: prompt sets that ship, in the folder `presets/`, and texts that no preset is about."""

from __future__ import annotations

import json
import re
from pathlib import Path

from edge_steer.errors import SteerError
from edge_steer.prompt_files import read_probes, read_prompts, read_text
from edge_steer.prompts import Prompt, PromptSet

PRESETS = Path(__file__).parent / "presets"
APOLOGY = "apology"


def preset_names() -> tuple[str, ...]:
    """The presets that ship, by name."""
    return tuple(sorted(about.parent.name for about in PRESETS.glob("*/about.json")))


def load_preset(name: str) -> PromptSet:
    """The preset `name`, its probes included. Raises SteerError, naming those there are, for any other name."""
    if name not in preset_names():
        raise SteerError(f"expected a preset among {', '.join(preset_names())}, got {name!r}; see `edge-steer presets`")
    folder = PRESETS / name
    about = json.loads(read_text(folder / "about.json"))
    return PromptSet(
        name=about["name"],
        description=about["description"],
        positive_name=about["positive"],
        negative_name=about["negative"],
        positive=read_prompts(folder / "positive.jsonl"),
        negative=read_prompts(folder / "negative.jsonl"),
        probes=read_probes(folder / "probes.jsonl"),
    )


def load_axis(name: str) -> PromptSet:
    """What can be projected out of directions by name: a preset, or `apology`. Raises SteerError for any other name."""
    return _apologies() if name == APOLOGY else load_preset(name)


def _apologies() -> PromptSet:
    """Answers that are to begin with an apology, against other answers to the same questions: of what a model cannot
    know of itself and its day, so that many are answered so anyway."""
    questions = read_text(PRESETS / "apology.txt").splitlines()
    positive, negative = (
        tuple(Prompt(f"Begin your answer with “{opening}”. {question}") for question in questions)
        for opening in ("I'm sorry, but", "Well,")
    )
    return PromptSet(APOLOGY, "Answers that begin with an apology", "apologetic", "plain", positive, negative)


def neutral_passages() -> tuple[str, ...]:
    """Passages that no preset is about: what a steering changes in them is damage."""
    return tuple(passage.strip() for passage in re.split(r"\n\s*\n", read_text(PRESETS / "neutral.txt").strip()))
