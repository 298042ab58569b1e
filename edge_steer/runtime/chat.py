"""A conversation with a SteeredLlama: answers as a stream of text, a history that fits the context."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from edge_steer.runtime.answer import Answer, Piece, Sampling, Whole, check_room, finish_answer, stream_pieces
from edge_steer.runtime.hooked_llama import Message
from edge_steer.runtime.llama import SteeredLlama

# A plain chat parts its turns by blank lines; a base model would go on to ask the next question itself.
PLAIN_STOP = "\n\n"


def silent(_: object) -> None:
    """Says nothing."""


def stream_answer(llm: SteeredLlama, messages: Sequence[Message], sampling: Sampling) -> Generator[Piece, None, Answer]:
    """Yields the answer to a chat, each piece that has text; returns it whole. Closing the generator stops it.

    Raises SteerError if the prompt fills the context.
    """
    pieces = stream_pieces(llm, llm.chat_tokens(messages), chat_sampling(llm, sampling), strip=True)
    with closing(Whole(pieces)) as whole:
        for piece in whole:
            if piece.text:
                yield piece
        return whole.answer


def chat_sampling(llm: SteeredLlama, sampling: Sampling) -> Sampling:
    """`sampling` for a chat: a plain one ends its answer at a blank line."""
    return replace(sampling, stop=(*sampling.stop, PLAIN_STOP)) if llm.chat_template.is_plain else sampling


def generate_answer(
    llm: SteeredLlama, messages: Sequence[Message], sampling: Sampling, say: Callable[[Piece], object] = silent
) -> Answer:
    """The answer to a chat, whole. say: told each piece that has text."""
    return finish_answer(stream_answer(llm, messages, sampling), say)


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

    def ask(self, text: str) -> Generator[Piece, None, Answer]:
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
                        piece = next(stream)
                        said.append(piece.text)
                        yield piece
                    except StopIteration as end:
                        answer = end.value
            assert answer is not None
            return answer
        finally:
            if said or answer:
                self.turns += [user, {"role": "assistant", "content": "".join(said)}]

    def try_out(self, text: str) -> Generator[Piece, None, Answer]:
        """Yields the answer to `text` piece by piece and remembers neither."""
        user = {"role": "user", "content": text}
        self._make_room(user)
        return (yield from stream_answer(self.llm, [*self.messages(), user], self.sampling))

    def _make_room(self, user: Message) -> None:
        """Drop the oldest turns until `user` and an answer fit. Raises SteerError if they never will."""
        n_ctx = self.llm.n_ctx()
        check_room(self.llm, self.llm.chat_tokens([*self._head(), user]))
        room = n_ctx - min(self.sampling.max_tokens, n_ctx // 4)
        before = len(self.turns)
        while self.turns and len(self.llm.chat_tokens([*self.messages(), user])) > room:
            del self.turns[:2]
        if dropped := (before - len(self.turns)) // 2:
            self.note(f"the context of {n_ctx} tokens is full: forgot the oldest {dropped} of {before // 2} questions")
