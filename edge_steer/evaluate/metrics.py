"""Effect and damage of a steering, from the model's own probabilities.

Letters: n tokens, V vocabulary. Log-probabilities are natural logarithms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.evaluate.model import MeasuredModel
from edge_steer.prompts import Probe

# Next tokens of which a reference keeps the probability; the rest is kept as one. On neutral passages this took less
# than a thousandth off the divergence (4,096 took half a hundredth), and it is 128 kB a token in place of a megabyte.
KEPT = 16384


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities (n, V) of logits (n, V)."""
    shifted: NDArray[np.float32] = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


def log_probabilities(llm: MeasuredModel, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
    """Log-probability of each of tokens[start:], given those before it, under the dials as they stand."""
    return chosen(log_softmax(llm.logits(tokens, start)), tokens[start:])


def chosen(log_p: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
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

    def per_token(prompt: str, answer: str) -> float:
        return float(log_probabilities(llm, *answer_tokens(llm, prompt, answer, system)).mean())

    gaps = [per_token(probe.prompt, probe.positive) - per_token(probe.prompt, probe.negative) for probe in probes]
    if not gaps:
        raise SteerError("expected probes to measure with, got none")
    return np.array(gaps)


@dataclass(frozen=True, eq=False)
class Expected:
    """What a model expects next at n places: its K likeliest tokens, and the mass of all others as one.

    tokens: (n, K) int32. log_p: (n, K) float32. rest: (n,) float64, the log-probability of all other tokens together;
    −inf where there are none.
    """

    tokens: NDArray[np.int32]
    log_p: NDArray[np.float32]
    rest: NDArray[np.float64]

    @classmethod
    def of(cls, log_p: NDArray[np.float32], keep: int = KEPT) -> Expected:
        """Of log-probabilities (n, V)."""
        keep = min(keep, log_p.shape[-1])
        tokens = np.argpartition(-log_p, keep - 1, axis=-1)[:, :keep].astype(np.int32)
        kept = np.take_along_axis(log_p, tokens, axis=-1)
        return cls(tokens, kept, _rest(kept, log_p.shape[-1]))

    def divergence(self, log_q: NDArray[np.float32]) -> NDArray[np.float64]:
        """KL(p‖q) in nats at each of the n places, p the expectation kept here, q of log-probabilities (n, V).

        Σ p (log p − log q) over the kept tokens and the rest as one more: exact where all are kept, else no more than
        the exact one (the log-sum inequality).
        """
        other = np.take_along_axis(log_q, self.tokens, axis=-1)
        found = (np.exp(self.log_p) * (self.log_p - other)).sum(axis=-1, dtype=np.float64)
        there = np.isfinite(self.rest)
        rest = np.where(there, self.rest, 0.0)
        found += np.where(there, np.exp(rest) * (rest - _rest(other, log_q.shape[-1])), 0.0)
        return np.asarray(np.maximum(found, 0.0))


def _rest(kept: NDArray[np.float32], vocabulary: int) -> NDArray[np.float64]:
    """Log of the probability mass (n,) that log-probabilities (n, K) of a vocabulary leave over."""
    if kept.shape[-1] == vocabulary:
        return np.full(len(kept), -np.inf)
    return np.asarray(np.log(np.maximum(1 - np.exp(kept).sum(axis=-1, dtype=np.float64), 1e-9)))
