"""Effect and damage of a steering, from the model's own probabilities.

Letters: n tokens, V vocabulary. Log-probabilities are natural logarithms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_steer.contrast import Probe
from edge_steer.errors import SteerError
from edge_steer.runtime.llama import SteeredLlama


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities (n, V) of logits (n, V)."""
    shifted: NDArray[np.float32] = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


def log_probabilities(llm: SteeredLlama, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
    """Log-probability of each of tokens[start:], given those before it, under the dials as they stand."""
    chosen = log_softmax(llm.logits(tokens, start))
    picked: NDArray[np.float32] = chosen[np.arange(len(tokens) - start), np.asarray(tokens[start:])]
    return picked


def answer_tokens(llm: SteeredLlama, prompt: str, answer: str) -> tuple[list[int], int]:
    """Tokens of a prompt with an answer, as the model would have written it, and where the answer starts."""
    text = llm.chat_template.render([{"role": "user", "content": prompt}])
    head = llm.text_tokens(text)
    gap = " " if llm.chat_template.is_plain else ""  # the plain template ends in "Answer:"
    tokens = llm.text_tokens(text + gap + answer)
    shared = next(
        (i for i, (a, b) in enumerate(zip(head, tokens, strict=False)) if a != b), min(len(head), len(tokens))
    )
    return tokens, shared


def probe_gaps(llm: SteeredLlama, probes: Iterable[Probe]) -> NDArray[np.float64]:
    """Per probe: log-probability per token of the positive minus that of the negative continuation, (probes,)."""

    def per_token(prompt: str, answer: str) -> float:
        return float(log_probabilities(llm, *answer_tokens(llm, prompt, answer)).mean())

    gaps = [per_token(probe.prompt, probe.positive) - per_token(probe.prompt, probe.negative) for probe in probes]
    if not gaps:
        raise SteerError("expected probes to measure with, got none")
    return np.array(gaps)


def text_log_probabilities(llm: SteeredLlama, passages: Iterable[str]) -> NDArray[np.float64]:
    """Mean log-probability per token of each passage of plain text, without a chat template, (passages,)."""
    means = []
    for passage in passages:
        tokens = list(llm.tokenize(passage.encode(), add_bos=True, special=False))
        means.append(float(log_probabilities(llm, tokens, 1).mean()))
    return np.array(means)
