"""AnsweringLlama: a CachedLlama that gives one answer at a time, under its dials, its scope and its gates."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.runtime.cache import Actions, Scope
from edge_steer.runtime.cached_llama import CachedLlama
from edge_steer.runtime.gates import AnswerGates, Marker, Place
from edge_steer.runtime.gates_by_name import Gates, answer_place, thinking_marker

Stream = Generator[int, Sequence[int] | None, None]


class AnsweringLlama(CachedLlama):
    """A llama_cpp.Llama whose tokens are evaluated as dials and gates say: an answer's, or those given to `eval`.

    scope: as for SteeredLlama. Everything else is for CachedLlama.
    """

    def __init__(self, *args: Any, scope: Scope = "all", **more: Any) -> None:
        self.scope = scope
        self._answer: object | None = None  # the answer that has the cache
        self._answering = False  # whether its prompt is evaluated
        self._gates_now: AnswerGates | None = None  # of the answer; None: nothing is gated
        self._lock = threading.RLock()  # held while llama.cpp works: threads that share this object take turns
        super().__init__(*args, **more)
        self._gates = Gates(self.steerings, lambda: self._thinking)
        self._opened = 0  # where the last token of the answer's prompt stands
        self._readings: dict[str, float] = {}  # of the latest token, where a gate runs on them

    @cached_property
    def _thinking(self) -> Marker | None:
        return thinking_marker(self)

    @property
    def scope(self) -> Scope:
        """Which tokens are steered. A new value acts from the next answer on."""
        return self._scope

    @scope.setter
    def scope(self, value: Scope) -> None:
        if value not in ("all", "response"):
            raise SteerError(f"expected the scope all or response, got {value!r}")
        self._scope: Scope = value

    # --- evaluating under gates ---------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens under the dials as they stand now: as a prompt, or as the next of the answer that runs.

        Of a prompt, all but the last token are evaluated without the steerings that are gated.
        """
        with self._lock:
            if self._answer is None:
                self._gates_now = self.open_gates(tokens, self.n_tokens)
            gates = self._gates_now
            if gates is None or (gates.constant and self._answering):
                self.evaluate(self._angles.actions(), tokens, () if gates is None else gates.gated)
            elif self._answering:
                self._evaluate_answer(gates, tokens)
            else:
                self.evaluate_head(gates, tokens)
                self.evaluate_gated(gates, tokens[-1:], opens=True)
                self._opened = self.n_tokens - 1
            self._answering = self._answer is not None

    def open_gates(self, prompt: Sequence[int], cached: int = 0) -> AnswerGates | None:
        """What the gates say in the answer to a prompt, which goes on from so many cached tokens; None where nothing is
        gated."""
        gates = self._gates.in_answer(self._scope)
        if not gates:
            return None
        if not any(gate is not None and gate.reads_text for gate in gates):
            return AnswerGates(gates, Place(None))
        return AnswerGates(gates, answer_place(self, [*self.input_ids[:cached].tolist(), *prompt], self._thinking))

    def usable_in(self, prompt: Sequence[int], gates: AnswerGates | None) -> int:
        """How many of the tokens that are cached an answer to `prompt` may use."""
        shared, length = self.shared(prompt), len(prompt)
        if gates is None:
            return self.usable(shared, length, self._angles.actions())
        found = self.usable(shared, length, self.prompt_actions(gates), self.gated_actions(gates), gates.gated)
        return min(found, length - 1) if gates.reads else found  # the last token is read anew

    def prompt_actions(self, gates: AnswerGates) -> Actions:
        """What acts on a prompt's tokens, but for the last."""
        return self._angles.scale(gates.on_prompt)

    def gated_actions(self, gates: AnswerGates) -> Actions:
        """What acts on the token that is next."""
        return self._angles.scale(gates.factors())

    def evaluate_head(self, gates: AnswerGates, tokens: Sequence[int]) -> None:
        """Evaluate a prompt's tokens but for the last one, and let every @when decide."""
        actions = self.prompt_actions(gates)
        self.evaluate(actions, tokens[:-1], gates.gated)
        if gates.reads and tokens:
            with self._reading(gates.reads) as readings:
                self.evaluate(actions, tokens[-1:], gates.gated)
            gates.decide(readings)
            prompt = self.input_ids[: self.n_tokens].tolist()
            self.keep(len(prompt) - 1)
            self.evaluate(actions, prompt[self.n_tokens : -1], gates.gated)  # none, unless all had to be forgotten

    def evaluate_gated(self, gates: AnswerGates, tokens: Sequence[int], **how: Any) -> list[NDArray[np.float32]]:
        """Evaluate a prompt's last token or those of its answer, as the gates say of the first. how: for `evaluate`."""
        actions = self.gated_actions(gates)
        if not gates.runs:
            return self.evaluate(actions, tokens, gates.gated, **how)
        with self._reading(gates.reads) as self._readings:
            return self.evaluate(actions, tokens, gates.gated, **how)

    def feed(self, gates: AnswerGates, token: int) -> None:
        """Tell the gates of an answer's next token, before it is evaluated."""
        gates.feed(self.detokenize([token], special=True) if gates.reads_text else b"", self._readings)

    def _evaluate_answer(self, gates: AnswerGates, tokens: Sequence[int]) -> None:
        """An answer's next tokens: the one that was chosen, behind it those that were sent, or drafts."""
        gates.back(self.n_tokens - 1 - self._opened)
        # Drafts want the logits of all, so they are evaluated as one, as the first of them.
        for part in [list(tokens)] if self._logits_all else [[each] for each in tokens]:
            self.feed(gates, part[0])
            self.evaluate_gated(gates, part)
            for each in part[1:]:
                self.feed(gates, each)

    @contextmanager
    def _reading(self, names: Sequence[str]) -> Iterator[dict[str, float]]:
        """Within it, tokens are read for the steerings `names`; what the last one reads is there as it ends."""
        found: dict[str, float] = {}
        with self.token_readings.of(names):
            yield found
        found.update((name, self.token_readings.at(name, self.n_tokens - 1)) for name in names)

    # --- answers ------------------------------------------------------------------------------------------------

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Stream:
        """As llama_cpp.Llama.generate; cached tokens that another steering state computed are evaluated again.

        There is one cache: an answer that was left when another began cannot go on, and raises SteerError.
        """
        tokens, answer = list(tokens), object()
        if not tokens:
            raise SteerError("expected a prompt of at least one token, got none; this model adds no BOS of its own")
        with self._lock:
            reset = kwargs.get("reset", True)
            self._gates_now = self.open_gates(tokens, 0 if reset else self.n_tokens)
            if reset:
                self.cut_cache(tokens, self.usable_in(tokens, self._gates_now))
            self._answer, self._answering = answer, False
        try:
            with closing(super().generate(tokens, *args, **kwargs)) as stream:
                follow = self._continue_answer if self._plain(*args, **kwargs) else self._follow
                yield from follow(answer, stream)
        except (Exception, KeyboardInterrupt):
            if self._answer is answer:
                self._requires_eval = True  # a decode may have ended without being noted
            raise
        finally:
            if self._answer is answer:
                self._leave()

    def _leave(self) -> None:
        """No answer has the cache any more."""
        self._answer, self._answering = None, False

    @contextmanager
    def without_answer(self) -> Iterator[None]:
        """The cache for something else than an answer."""
        with self._lock:
            self._leave()
            yield

    def _demand_turn(self, answer: object) -> None:
        if self._answer is not answer:
            raise SteerError(
                "this answer was left when the model began something else or was closed; end a stream before the "
                "next, or give each its own SteeredLlama"
            )

    def _plain(self, *args: Any, **how: Any) -> bool:
        """Whether an answer goes on as `_continued` has it: nothing but the sampler decides on a token."""
        extras = (how.get("stopping_criteria"), how.get("logits_processor"), self.draft_model)
        return not args and not self._logits_all and extras == (None, None, None)

    def _follow(self, answer: object, stream: Stream) -> Stream:
        """An answer as Llama.generate goes on."""
        sent = None
        while True:
            with self._lock:
                self._demand_turn(answer)
                try:
                    token = stream.send(sent)
                except StopIteration:
                    return
            sent = yield token

    def _continue_answer(self, answer: object, stream: Stream) -> Stream:
        """An answer whose first token is the stream's. As Llama.generate goes on, with fewer calls for each token: a
        decode leaves none of Python in the processor's caches, and each costs ten times what it costs in a loop of its
        own."""
        with self._lock:
            self._demand_turn(answer)
            token = next(stream)
        sampler, context, lock = self._sampler, self._ctx, self._lock
        while True:
            sent = yield token
            with lock:
                self._demand_turn(answer)
                self.eval([token] if sent is None else [token, *sent])
                token = sampler.sample(context, -1)
