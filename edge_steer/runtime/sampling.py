"""Choosing the next token at a cost that does not grow with the vocabulary.

llama.cpp's penalties look every token of the vocabulary up in a table, to change the few that were said last; and its
greedy sampler first copies the vocabulary. Here the penalties change those few logits where they lie, and the greedy
choice is one look over the row (native/choose.h). The tokens chosen are llama.cpp's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge_steer.errors import SteerError
from edge_steer.runtime.native import Charges, library


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
        self._vocabulary = vocabulary
        self._chain = chain
        self._library = library()
        self._room = penalties.last if penalties.act else 0
        self._said = np.zeros(self._room, np.int32)  # the latest, round and round
        self._kept = np.zeros(self._room, np.float32)
        self._count = 0
        self._charges = Charges(
            penalties.repeat, penalties.frequency, penalties.presence, 0, self._said.ctypes.data, self._kept.ctypes.data
        )
        self._charged = ctypes.byref(self._charges)
        self._token = ctypes.c_int32()
        self._to_token = ctypes.byref(self._token)

    def sample(self, ctx: Any, idx: int = -1) -> int:
        """The next token, by the logits of output `idx` of the context; it counts as said."""
        logits = ctx.get_logits_ith(idx)
        if self._chain is None:
            _check(self._library.choose_likeliest(self._charged, logits, self._vocabulary, self._to_token))
            token = self._token.value
        elif self._room:
            _check(self._library.choose_charge(self._charged, logits, self._vocabulary))
            try:
                token = self._chain.sample(ctx, idx)
            finally:
                self._library.choose_restore(self._charged, logits, self._vocabulary)
        else:
            token = self._chain.sample(ctx, idx)
        if self._room:
            self._said[self._count % self._room] = token
            self._count += 1
            self._charges.n = min(self._count, self._room)
        return token


def _check(status: int) -> None:
    if status:
        raise SteerError(f"the next token could not be chosen (status {status} of choose.h)")
