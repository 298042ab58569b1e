"""What a steering is measured on, and how much of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from edge_steer.measure.capability import Question, load_questions
from edge_steer.preset import PRESETS, load_preset, neutral_passages, preset_names
from edge_steer.prompts import Probe, Prompt, PromptSet
from edge_steer.steering import Steering

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationSizes:
    """How much is measured at one position of the dial."""

    probes: int = 24
    passages: int = 12
    questions: int = 160
    answers: int = 32  # one that runs in circles must not decide
    answer_tokens: int = 32
    held_out: int = 6  # prompts a class


QUICK_SIZES = EvaluationSizes(probes=8, passages=6, questions=40, answers=4, answer_tokens=32, held_out=3)


@dataclass(frozen=True)
class EvaluationSet:
    """The texts that one position of the dial is measured on.

    probes: the effect. passages: neutral text, what changes in them is damage. questions: what the model should still
    know. openings: prompts that it answers. positive, negative: held-out prompts of the two classes.
    """

    probes: tuple[Probe, ...]
    passages: tuple[str, ...]
    questions: tuple[Question, ...]
    openings: tuple[str, ...]
    answer_tokens: int
    positive: tuple[Prompt, ...] = ()
    negative: tuple[Prompt, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of all of it: figures from other texts are other figures."""
        texts = asdict(self)
        for prompt in (*texts["positive"], *texts["negative"]):
            del prompt["origin"]
        return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def build_evaluation_set(
    sizes: EvaluationSizes, probes: Sequence[Probe] = (), held_out: PromptSet | None = None
) -> EvaluationSet:
    """The shipped texts in the `sizes` wanted, spread over each set, with the probes and held-out prompts given."""
    openings = (PRESETS / "open_ended.txt").read_text(encoding="utf-8").splitlines()
    return EvaluationSet(
        probes=pick_evenly(probes, sizes.probes),
        passages=pick_evenly(neutral_passages(), sizes.passages),
        questions=pick_evenly(load_questions(), sizes.questions),
        openings=pick_evenly(openings, sizes.answers),
        answer_tokens=sizes.answer_tokens,
        positive=pick_evenly(held_out.positive, sizes.held_out) if held_out else (),
        negative=pick_evenly(held_out.negative, sizes.held_out) if held_out else (),
    )


def pick_evenly(items: Sequence[T], count: int) -> tuple[T, ...]:
    """At most `count` of the items, evenly spread over them."""
    count = min(count, len(items))
    return tuple(items[number * len(items) // count] for number in range(count))


def find_preset(steering: Steering) -> PromptSet | None:
    """The preset whose prompts, or first prompts, the steering was calibrated on; None for other prompts."""
    for name in preset_names():
        preset = load_preset(name)
        used = max(steering.made.positive_count, steering.made.negative_count, 1)
        if steering.made.prompts_sha256 in (preset.sha256, preset.first(used).sha256):
            return preset
    return None
