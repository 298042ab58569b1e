"""Does the model still know what it knew: short questions with certain answers, scored by log-probability.

The question set ships as `presets/capability.jsonl`: facts, science, numbers, language, common sense, and questions
that name their options. Every question is asked as plain text without a chat template, so that models with and without
one are asked alike. Letters: Q questions, O options, the answer first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_steer.measure.metrics import log_softmax, pick_log_probabilities, plain_tokens, shared_prefix
from edge_steer.preset import PRESETS
from edge_steer.runtime.llama import SteeredLlama


@dataclass(frozen=True)
class Question:
    """The beginning of a text, the one right continuation, and `others` that are wrong."""

    kind: str
    prompt: str
    answer: str
    others: tuple[str, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """All options, the answer first."""
        return (self.answer, *self.others)


def load_questions() -> tuple[Question, ...]:
    """The question set that ships."""
    records = map(json.loads, (PRESETS / "capability.jsonl").read_text(encoding="utf-8").splitlines())
    return tuple(Question(**{**record, "others": tuple(record["others"])}) for record in records)


def score_options(llm: SteeredLlama, questions: Sequence[Question]) -> list[list[float]]:
    """Per question, the log-probability per token of each option after the prompt, the answer's first.

    Questions are asked in the order of their tokens, so that what two of them share is evaluated once.
    """
    asked = [_tokens(llm, question) for question in questions]
    scores: list[list[float]] = [[] for _ in questions]
    for number in sorted(range(len(asked)), key=lambda each: asked[each][0]):
        scores[number] = _scores(llm, *asked[number])
    return scores


def _tokens(llm: SteeredLlama, question: Question) -> tuple[list[int], list[list[int]]]:
    """Tokens that all options come after, and those of each option."""
    texts = [plain_tokens(llm, f"{question.prompt} {option}") for option in question.options]
    head = plain_tokens(llm, question.prompt)
    shared = min(shared_prefix(head, text) for text in texts)
    return head[:shared], [text[shared:] for text in texts]


def _scores(llm: SteeredLlama, head: list[int], options: Sequence[list[int]]) -> list[float]:
    # One row tells the first token of every option; only options of several tokens need the model again.
    first = log_softmax(llm.logits([*head, options[0][0]], len(head)))[0]
    found = []
    for option in options:
        total = float(first[option[0]])
        if len(option) > 1:
            rows = log_softmax(llm.logits([*head, *option], len(head) + 1))
            total += float(pick_log_probabilities(rows, option[1:]).sum())
        found.append(total / len(option))
    return found


def is_correct(scores: Sequence[Sequence[float]]) -> NDArray[np.bool_]:
    """(Q,) whether the answer scores higher than every other option."""
    return np.array([max(each[1:]) < each[0] for each in scores], np.bool_)


def confidence(scores: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """(Q,) the share exp(score) of the answer among the options: moves smoothly where `is_correct` jumps."""
    shares = []
    for each in scores:
        weights = np.exp(np.array(each) - max(each))
        shares.append(float(weights[0] / weights.sum()))
    return np.array(shares)
