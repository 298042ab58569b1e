"""Effect and damage of a steering, from the model's own probabilities.

Letters: n tokens, V vocabulary. Log-probabilities are natural logarithms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.measure.measured_model import MeasuredModel
from edge_steer.prompts import Probe

Float = TypeVar("Float", np.float32, np.float64)


def log_softmax(logits: NDArray[Float]) -> NDArray[Float]:
    """Log-probabilities (n, V) of logits (n, V), in their type. float64: the KL of two exact engines is below what
    float32 resolves."""
    shifted: NDArray[Float] = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(shifted.dtype)
    return shifted


def log_probabilities(llm: MeasuredModel, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
    """Log-probability of each of tokens[start:], given those before it, under the dials as they stand."""
    return pick_log_probabilities(log_softmax(llm.logits(tokens, start)), tokens[start:])


def pick_log_probabilities(log_p: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
    """The log-probability of each of `tokens` (n,) in its row of log_p (n, V)."""
    picked: NDArray[np.float32] = log_p[np.arange(len(tokens)), np.asarray(tokens)]
    return picked


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def answer_tokens(llm: MeasuredModel, prompt: str, answer: str, system: str | None = None) -> tuple[list[int], int]:
    """Tokens of a prompt with an answer, as the model would have written it, and where the answer starts."""
    head_messages = [] if system is None else [{"role": "system", "content": system}]
    text = llm.chat_template.render([*head_messages, {"role": "user", "content": prompt}])
    head = llm.text_tokens(text)
    gap = " " if llm.chat_template.is_plain else ""  # the plain template ends in "Answer:"
    tokens = llm.text_tokens(text + gap + answer)
    return tokens, shared_prefix(head, tokens)


def plain_tokens(llm: MeasuredModel, text: str) -> list[int]:
    """Tokens of plain text, without a chat template."""
    return list(llm.tokenize(text.encode(), add_bos=True, special=False))


def probe_gaps(llm: MeasuredModel, probes: Iterable[Probe], system: str | None = None) -> NDArray[np.float64]:
    """Per probe: log-probability per token of the positive minus that of the negative continuation, (probes,).

    system: a system prompt over each probe.
    """
    texts = [
        answer_tokens(llm, probe.prompt, answer, system)
        for probe in probes
        for answer in (probe.positive, probe.negative)
    ]
    if not texts:
        raise SteerError("expected probes to measure with, got none")

    def per_token(number: int, rows: NDArray[np.float32]) -> float:
        tokens, start = texts[number]
        return float(pick_log_probabilities(log_softmax(rows), tokens[start:]).mean())

    found = np.array(llm.map_logits(texts, per_token))
    return np.asarray(found[0::2] - found[1::2])
