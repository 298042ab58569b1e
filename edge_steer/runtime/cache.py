"""The cache rule: a cached token is valid only for the steering state that computed it.

Every cached token bears the state it was computed under. Before an answer, the cache is cut at the first token that
does not fit. Nothing here knows a model: it is arithmetic on states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from edge_steer.rotation import Action

Scope = Literal["all", "response"]
Actions = tuple[Action | None, ...]  # of the steerings, in their order; None is off
# States that are told apart before those that no cached token bears are forgotten: each costs some 400 bytes.
_MOST = 4096


@dataclass(frozen=True)
class State:
    """What acted on a token: digests of steerings and what each did, "" where none acted. The same in every process.

    digest: of all that acted. always: of those among them that no gate held back. gated: fingerprints of the others.
    """

    digest: str = ""
    always: str = ""
    gated: frozenset[str] = frozenset()


OFF = State()
_UNKNOWN = State("?", "?")  # of a token that something else cached: fits nothing


@dataclass(frozen=True)
class Wanted:
    """What an answer wants of the cache: the state of its prompt's tokens, that of the last one, and the fingerprints
    of the steerings whose gates leave the prompt alone."""

    prompt: State
    last: State
    gated: frozenset[str] = frozenset()


class CacheStamps:
    """The state of every cached token, and whether a response opened with it (its last prompt token).

    Meaningful for as many tokens as are cached, which the caller knows.
    """

    def __init__(self, length: int, fingerprints: Sequence[str]) -> None:
        """length: of the context, in tokens. fingerprints: of the steerings, in the order of the actions."""
        self._fingerprints = tuple(fingerprints)
        self._numbers: dict[State, int] = {OFF: 0, _UNKNOWN: 1}
        self._stamps = np.zeros(length, np.int32)
        self._opens = np.zeros(length, np.bool_)
        self.state = lru_cache(maxsize=_MOST)(self._state)

    def _state(self, actions: Actions, gated: tuple[bool, ...] = ()) -> State:
        """The state in which the steerings do `actions`; gated: which of them stand under a gate, () for none. Those
        that act alike are one; off is always the same."""
        acting = [
            (fingerprint, f"{fingerprint} {action}", under)
            for fingerprint, action, under in zip(
                self._fingerprints, actions, gated or (False,) * len(actions), strict=True
            )
            if action is not None
        ]
        every, always = [each for _, each, _ in acting], [each for _, each, under in acting if not under]
        return State(_digest(every), _digest(always), frozenset(each for each, _, under in acting if under))

    def wanted(self, prompt: Actions, last: Actions, gated: tuple[bool, ...]) -> Wanted:
        """What an answer wants whose prompt is evaluated under the actions `prompt`, and its last token under `last`.
        gated: as for `state`."""
        under = frozenset(each for each, gate in zip(self._fingerprints, gated, strict=False) if gate)
        return Wanted(self.state(prompt, gated), self.state(last, gated), under)

    def stamp(self, begin: int, end: int, state: State, *, opens: bool = False) -> None:
        """Note that the tokens begin…end were computed under `state`; opens: that a response
        begins with the first."""
        number = self._numbers.get(state)
        if number is None:
            number = self._number(state, begin)
        self._stamps[begin:end] = number
        self._opens[begin:end] = False
        if opens:
            self._opens[begin] = True

    def _number(self, state: State, cached: int) -> int:
        """A number for a new state. Where there are too many, those that none of the `cached` tokens bears go."""
        if len(self._numbers) >= _MOST:
            used = {0, 1, *np.unique(self._stamps[:cached]).tolist()}
            self._numbers = {each: number for each, number in self._numbers.items() if number in used}
        return self._numbers.setdefault(state, max(self._numbers.values()) + 1)

    def usable(self, shared: int, length: int, wanted: Wanted) -> int:
        """How many of the first `shared` cached tokens, which a prompt of `length` tokens begins with, fit an answer.

        A prompt bears what is not gated. What stands in it of earlier answers stays as it was written: there, any
        gated steering may have acted in any way.
        """
        stamps, plain = self._stamps[:shared], self._numbers.get(wanted.prompt, -1)
        if not wanted.gated:
            fits = stamps == plain
        else:
            fits = np.isin(stamps, [number for state, number in self._numbers.items() if _may_bear(state, wanted)])
            if shared == len(stamps) == length:
                fits[-1:] = stamps[-1:] == self._numbers.get(wanted.last, -1)
        keep = shared if fits.all() else int(np.flatnonzero(~fits)[0])
        # A former last prompt token without its answer is a prompt token again, on which no gated steering acts.
        if wanted.gated and 0 < keep < length and self._opens[keep - 1] and stamps[keep - 1] != plain:
            keep -= 1
        return keep

    def save(self, count: int) -> dict[str, list[Any]]:
        """What is known of the first `count` tokens, for a saved state of the model."""
        states = {number: state for state, number in self._numbers.items()}
        return {
            "states": [states[int(number)] for number in self._stamps[:count]],
            "opens": self._opens[:count].tolist(),
        }

    def load(self, count: int, saved: dict[str, list[Any]] | None, *, unsteered: bool) -> None:
        """Take over what `save` gave. None, of a state that a plain Llama saved: unsteered, which is known to fit only
        where nothing acts now."""
        if saved is None:
            self.stamp(0, count, OFF if unsteered else _UNKNOWN)
            return
        for at, (state, opens) in enumerate(zip(saved["states"], saved["opens"], strict=True)):
            self.stamp(at, at + 1, state, opens=opens)


def _digest(acting: Collection[str]) -> str:
    return hashlib.sha256("\n".join(acting).encode()).hexdigest() if acting else ""


def _may_bear(state: State, wanted: Wanted) -> bool:
    """Whether a token in a prompt may bear `state`: one of the prompt, or of an answer that was written earlier."""
    return state.always == wanted.prompt.always and state.gated <= wanted.gated
