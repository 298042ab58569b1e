"""Choosing the next token at a cost that does not grow with the vocabulary.

llama.cpp's penalties look every token of the vocabulary up in a table, to change the few that were said last; and its
greedy sampler first copies the vocabulary. Here the penalties change those few logits where they lie, and the greedy
choice is one argmax. The tokens chosen are llama.cpp's.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class Chain(Protocol):
    """llama-cpp-python's LlamaSampler, as far as Llama uses it."""

    def sample(self, ctx: Any, idx: int = -1) -> int: ...


@dataclass(frozen=True)
class Penalties:
    """What tokens among the `last` said are charged, as in llama.cpp's `llama_sampler_init_penalties`."""

    last: int = 64
    repeat: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0

    @property
    def act(self) -> bool:
        return self.last > 0 and (self.repeat, self.frequency, self.presence) != (1.0, 0.0, 0.0)


class Sampler:
    """Penalties, then `chain`; without a chain, the most likely token. Logits are left as they were found."""

    def __init__(self, vocabulary: int, penalties: Penalties, chain: Chain | None) -> None:
        self._shape = (vocabulary,)
        self._penalties = penalties
        self._chain = chain
        self._said: deque[int] = deque()
        self._counts: Counter[int] = Counter()

    def sample(self, ctx: Any, idx: int = -1) -> int:
        """The next token, by the logits of output `idx` of the context; it counts as said."""
        logits: Logits = np.ctypeslib.as_array(ctx.get_logits_ith(idx), shape=self._shape)
        if not self._penalties.act:
            return self._choose(ctx, idx, logits)
        tokens = np.fromiter(self._counts, np.intp, len(self._counts))
        found = logits[tokens]
        logits[tokens] = self._charge(found)
        try:
            token = self._choose(ctx, idx, logits)
        finally:
            logits[tokens] = found
        self._say(token)
        return token

    def _choose(self, ctx: Any, idx: int, logits: Logits) -> int:
        return int(logits.argmax()) if self._chain is None else self._chain.sample(ctx, idx)

    def _charge(self, logits: Logits) -> Logits:
        how = self._penalties
        counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        repeat = np.float32(how.repeat)
        with np.errstate(all="ignore"):  # a repeat of 0 makes infinities, as in llama.cpp
            repeated = np.where(logits <= 0, logits * repeat, logits / repeat)
            charged: Logits = repeated - (counts * np.float32(how.frequency) + np.float32(how.presence))
        return charged

    def _say(self, token: int) -> None:
        self._said.append(token)
        self._counts[token] += 1
        if len(self._said) > self._penalties.last:
            old = self._said.popleft()
            self._counts[old] -= 1
            if not self._counts[old]:
                del self._counts[old]
