"""A conversation with a SteeredLlama: answers as a stream of text, a history that fits the context."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field


from edge_steer.errors import SteerError
from edge_steer.runtime.llama import Message, SteeredLlama


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
    """One answer and what it cost."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0


def stream_answer(llm: SteeredLlama, messages: Sequence[Message], sampling: Sampling) -> Generator[str, None, Answer]:
    """Yields the answer to a chat piece by piece; returns it whole. Closing the generator stops it.

    `seconds` are those of generation, from the first token on. Raises SteerError where the prompt fills the context.
    """
    tokens = llm.chat_tokens(messages)
    if len(tokens) >= llm.n_ctx():
        raise SteerError(f"the prompt has {len(tokens)} tokens, the context holds {llm.n_ctx()}; raise --ctx")
    plain = llm.chat_template.is_plain
    stream = llm.create_completion(
        tokens,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repeat_penalty=sampling.repeat_penalty,
        seed=sampling.seed,
        # A plain chat separates its turns by blank lines; a base model would go on to ask the next question itself.
        stop=["\n\n"] if plain else [],
        stream=True,
    )
    parts: list[str] = []
    first = 0.0
    for chunk in stream:
        first = first or time.perf_counter()
        piece = chunk["choices"][0]["text"]
        if not parts:
            piece = piece.lstrip()  # a template without a generation prompt's last space leaves it to the model
        if piece:
            parts.append(piece)
            yield piece
    generated = max(0, llm.n_tokens + 1 - len(tokens))
    seconds = time.perf_counter() - first if first else 0.0
    return Answer("".join(parts), len(tokens), generated, seconds)


@dataclass
class Chat:
    """A conversation that remembers. It drops its oldest turns where they no longer fit, never the system prompt."""

    llm: SteeredLlama
    sampling: Sampling
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self, *further: Message) -> list[Message]:
        """The chat so far, system prompt first, with further messages behind it."""
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns, *further]

    def make_room(self, text: str) -> int:
        """Drop the oldest turns until `text` and an answer fit; returns how many messages went."""
        user = {"role": "user", "content": text}
        room = self.llm.n_ctx() - min(self.sampling.max_tokens, self.llm.n_ctx() // 4)
        dropped = 0
        while self.turns and len(self.llm.chat_tokens(self.messages(user))) > room:
            gone = 2 if len(self.turns) > 1 else 1
            del self.turns[:gone]
            dropped += gone
        return dropped

    def ask(self, text: str) -> Generator[str, None, Answer]:
        """Yields the answer to `text` piece by piece and remembers both, also an answer that was stopped."""
        user = {"role": "user", "content": text}
        said: list[str] = []
        stream = stream_answer(self.llm, self.messages(user), self.sampling)
        try:
            while True:
                try:
                    piece = next(stream)
                except StopIteration as end:
                    answer: Answer = end.value
                    return answer
                said.append(piece)
                yield piece
        finally:
            stream.close()
            if said:
                self.turns += [user, {"role": "assistant", "content": "".join(said)}]
