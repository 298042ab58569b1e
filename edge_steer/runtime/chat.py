"""A conversation with a SteeredLlama: answers as a stream of text, a history that fits the context."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from edge_steer.errors import SteerError
from edge_steer.runtime.hooked_llama import Message
from edge_steer.runtime.llama import SteeredLlama

# A plain chat parts its turns by blank lines; a base model would go on to ask the next question itself.
PLAIN_STOP = "\n\n"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; max_tokens is per answer."""

    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    repeat_penalty: float = 1.1
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost. `generated_tokens` counts no end-of-answer token; `seconds` run from the first
    token to the last, so that the prompt is not in them."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return (self.generated_tokens - 1) / self.seconds if self.seconds > 0 else 0.0


def silent(_: str) -> None:
    """Says nothing."""


def stream_answer(llm: SteeredLlama, messages: Sequence[Message], sampling: Sampling) -> Generator[str, None, Answer]:
    """Yields the answer to a chat piece by piece; returns it whole. Closing the generator stops it.

    Blanks at its head are left out: a template that ends without a space leaves it to the model.
    Raises SteerError if the prompt fills the context.
    """
    prompt = llm.chat_tokens(messages)
    _check_room(llm, prompt)
    stop = PLAIN_STOP if llm.chat_template.is_plain else None
    most = min(sampling.max_tokens, llm.n_ctx() - len(prompt))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, shown = "", 0
    count, first, last = 0, 0.0, 0.0
    llm.set_seed(sampling.seed)
    tokens = llm.generate(
        prompt, temp=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p,
        repeat_penalty=sampling.repeat_penalty,
    )  # fmt: skip
    with closing(tokens):
        for token in tokens:
            piece = llm.piece(token)
            if piece is None:
                break
            last = time.perf_counter()
            first = first or last
            count += 1
            text += decoder.decode(piece)
            if not shown:
                text = text.lstrip()
            if stop and stop in text:
                text = text[: text.index(stop)]
                break
            ready = len(text) - (_begun(text, stop) if stop else 0)
            if ready > shown:
                yield text[shown:ready]
                shown = ready
            if count == most:
                break
    text += decoder.decode(b"", final=True)
    if len(text) > shown:
        yield text[shown:]
    return Answer(text, len(prompt), count, last - first)


def generate_answer(
    llm: SteeredLlama, messages: Sequence[Message], sampling: Sampling, say: Callable[[str], object] = silent
) -> Answer:
    """The answer to a chat, whole. say: told its text piece by piece."""
    stream = stream_answer(llm, messages, sampling)
    with closing(stream):
        while True:
            try:
                say(next(stream))
            except StopIteration as end:
                found: Answer = end.value
                return found


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def _check_room(llm: SteeredLlama, prompt: Sequence[int]) -> None:
    if len(prompt) >= llm.n_ctx():
        raise SteerError(
            f"expected a prompt of less than {llm.n_ctx()} tokens, the context, got {len(prompt)}; {llm.longer()}"
        )


@dataclass
class Chat:
    """A conversation that remembers. It drops its oldest turns where they no longer fit, never the system prompt.

    note: told, in a line, when turns are dropped.
    """

    llm: SteeredLlama
    sampling: Sampling
    system: str | None = None
    note: Callable[[str], object] = silent
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """The chat so far, the system prompt first."""
        return [*self._head(), *self.turns]

    def _head(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str) -> Generator[str, None, Answer]:
        """Yields the answer to `text` piece by piece and remembers both, also an answer that was stopped."""
        user = {"role": "user", "content": text}
        self._make_room(user)
        said: list[str] = []
        answer: Answer | None = None
        stream = stream_answer(self.llm, [*self.messages(), user], self.sampling)
        try:
            with closing(stream):
                while answer is None:
                    try:
                        said.append(next(stream))
                        yield said[-1]
                    except StopIteration as end:
                        answer = end.value
            assert answer is not None
            return answer
        finally:
            if said or answer:
                self.turns += [user, {"role": "assistant", "content": "".join(said)}]

    def try_out(self, text: str) -> Generator[str, None, Answer]:
        """Yields the answer to `text` piece by piece and remembers neither."""
        user = {"role": "user", "content": text}
        self._make_room(user)
        return (yield from stream_answer(self.llm, [*self.messages(), user], self.sampling))

    def _make_room(self, user: Message) -> None:
        """Drop the oldest turns until `user` and an answer fit. Raises SteerError if they never will."""
        n_ctx = self.llm.n_ctx()
        _check_room(self.llm, self.llm.chat_tokens([*self._head(), user]))
        room = n_ctx - min(self.sampling.max_tokens, n_ctx // 4)
        before = len(self.turns)
        while self.turns and len(self.llm.chat_tokens([*self.messages(), user])) > room:
            del self.turns[:2]
        if dropped := (before - len(self.turns)) // 2:
            self.note(f"the context of {n_ctx} tokens is full: forgot the oldest {dropped} of {before // 2} questions")
