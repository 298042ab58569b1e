"""What every route works on: the model, its queue, and the defaults of a request."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio

from edge_steer.errors import SteerError
from edge_steer.gate import Gate
from edge_steer.runtime.answer import Answer, Piece, Sampling, check_room, finish_answer, stream_pieces
from edge_steer.runtime.chat import chat_sampling
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.serve.errors import ApiError
from edge_steer.serve.fields import Common, Message
from edge_steer.serve.gate_field import read_gates, split_alias, split_gates
from edge_steer.serve.messages import for_template
from edge_steer.serve.steering_field import FIELD, BadRequest, Dial, parse_alias, parse_steering
from edge_steer.serve.worker import Ping, Ticket, Worker


@dataclass(frozen=True)
class Begun:
    """The request has its turn."""


@dataclass(frozen=True)
class Said:
    """What a token adds to the answer `index` of a request that wants several, and the dials at which it was said."""

    index: int
    piece: Piece
    dials: dict[str, Dial]


@dataclass(frozen=True)
class Ended:
    index: int
    answer: Answer


T = TypeVar("T")
Event = Begun | Said | Ended | Ping


@dataclass
class Service:
    """The model behind the routes.

    name: what the model is called. sampling: of a request that says nothing. patience: seconds a request may wait.
    metrics: whether counts are told to who asks.
    """

    llm: SteeredLlama
    worker: Worker
    name: str
    sampling: Sampling
    patience: float = 300.0
    metrics: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    dials: dict[str, Dial] = field(init=False)  # of a request that names none
    gates: dict[str, Gate | None] = field(init=False)  # of steerings for which a request names none
    prompt_tokens: int = 0
    generated_tokens: int = 0
    _preparing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.dials = dict(self.llm.angles)
        self.gates = dict(self.llm.gates)

    # --- what a request asks for ------------------------------------------------------------------------------

    def dials_of(self, request: Common) -> dict[str, Dial]:
        """The dials of a request: its field `steering`, else those in the model's name, else the server's."""
        try:
            if "steering" in request.model_fields_set:
                return parse_steering(request.steering, self.llm.steerings)
            _, named = parse_alias(request.model or "", self.llm.steerings, self.name)
        except BadRequest as error:
            raise ApiError(400, error.message, param=error.param) from None
        return dict(self.dials) if named is None else named

    def gates_of(self, request: Common) -> dict[str, Gate | None]:
        """The gates of a request: those where it names its dials, else the server's."""
        given = request.steering
        if "steering" not in request.model_fields_set:
            given = (request.model or "").removeprefix(f"{self.name}@")
            given = given if given != request.model else split_alias(given)[1]
        return {**self.gates, **self.named_gates(given)}

    def named_gates(self, given: Any) -> dict[str, Gate | None]:
        """The gates in the value of a field `steering`. Raises ApiError."""
        try:
            return read_gates(split_gates(given)[1], self.llm.gates)
        except SteerError as error:
            raise ApiError(400, str(error), param=FIELD) from None

    def sampling_of(self, request: Common, **more: Any) -> Sampling:
        """How a request wants its tokens chosen."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty",
            "grammar",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(request, name)) is not None}
        seed = request.seed
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        given |= {"seed": secrets.randbits(32) if seed is None or seed == -1 else seed & 0xFFFFFFFF, "stop": stop}
        if (most := getattr(request, "max_completion_tokens", None) or request.max_tokens) is not None:
            given["max_tokens"] = most if most > 0 else 1 << 30
        if request.logit_bias:
            given["logit_bias"] = self._bias(request.logit_bias)
        if request.read:
            given["read"] = self._read()
        return replace(self.sampling, **given, **more)

    def readable(self) -> tuple[str, ...]:
        """The names of all steerings, if they can be read; one that cannot keeps the others from it."""
        try:
            return self._read()
        except ApiError:
            return ()

    def _read(self) -> tuple[str, ...]:
        """The names of all steerings, which a request wants read."""
        names = tuple(each.name for each in self.llm.steerings)
        try:
            self.llm.token_readings.check(names)
        except SteerError as error:
            raise ApiError(400, str(error), param="read") from None
        return names

    def _bias(self, given: Mapping[str, float]) -> dict[int, float]:
        found: dict[int, float] = {}
        for token, bias in given.items():
            if not (token.isascii() and token.isdigit() and int(token[:12]) < self.llm.n_vocab()):
                most = self.llm.n_vocab() - 1
                raise ApiError(400, f"expected tokens from 0 to {most}, got {token[:40]!r}", param="logit_bias")
            found[int(token)] = bias
        return found

    # --- prompts ----------------------------------------------------------------------------------------------

    async def chat_prompt(self, messages: Sequence[Message], **more: Any) -> list[int]:
        """Tokens of a chat; `more` is for the template. Raises ApiError if it cannot be rendered or has no room."""

        def render() -> list[int]:
            return self.llm.text_tokens(self._render(messages, more))

        return await self._prepare(render, "messages")

    async def chat_text(self, messages: Sequence[Message], **more: Any) -> str:
        """The text of a chat. Raises ApiError if it cannot be rendered."""
        return await self.on_vocabulary(lambda: self._render(messages, more), "messages")

    async def text_prompt(self, text: str) -> list[int]:
        """Tokens of a text as it stands, with the BOS that the model wants."""
        return await self._prepare(lambda: self.llm.tokenize(text.encode(), add_bos=True, special=True), "prompt")

    async def on_vocabulary(self, work: Callable[[], T], param: str = "content") -> T:
        """What `work` finds, on a thread beside the model's. Raises ApiError, of the field `param`, for SteerError."""

        def prepare() -> T:
            with self._preparing:
                return work()

        try:
            return await anyio.to_thread.run_sync(prepare)
        except SteerError as error:
            raise ApiError(400, str(error), param=param) from None

    async def _prepare(self, render: Callable[[], list[int]], param: str) -> list[int]:
        return self.check_tokens(list(await self.on_vocabulary(render, param)), param)

    def _render(self, messages: Sequence[Message], more: Mapping[str, Any]) -> str:
        return self.llm.chat_template.render([for_template(each) for each in messages], **more)

    def check_tokens(self, tokens: list[int], param: str) -> list[int]:
        """`tokens`, if they are the vocabulary's and leave room for an answer. Raises ApiError."""
        try:
            check_room(self.llm, tokens)
        except SteerError as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None
        if not tokens:
            raise ApiError(400, "expected a prompt of at least one token, got none", param=param)
        if max(tokens) >= self.llm.n_vocab():
            raise ApiError(400, f"expected tokens from 0 to {self.llm.n_vocab() - 1}, got {max(tokens)}", param=param)
        return tokens

    # --- answers ----------------------------------------------------------------------------------------------

    def submit(
        self,
        kind: str,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        dials: dict[str, Dial],
        gates: dict[str, Gate | None],
        *,
        chat: bool = False,
        fresh: bool = False,
    ) -> Ticket:
        """Queue an answer to each prompt, of which the i-th has the seed `sampling.seed` + i.

        chat: blanks at an answer's head are left out. fresh: nothing that is cached is used.
        Raises ApiError if the queue is full.
        """
        how = chat_sampling(self.llm, sampling) if chat else sampling

        def work(llm: SteeredLlama, ticket: Ticket) -> None:
            ticket.tell(Begun())
            for index, prompt in enumerate(prompts):
                if fresh:
                    llm.reset()
                pieces = stream_pieces(llm, prompt, replace(how, seed=(how.seed + index) & 0xFFFFFFFF), strip=chat)
                answer = _follow(pieces, llm, ticket, index)
                self.prompt_tokens += answer.prompt_tokens
                self.generated_tokens += answer.generated_tokens
                ticket.tell(Ended(index, answer))

        return self.worker.submit(kind, dials, gates, work)

    async def events(self, ticket: Ticket) -> AsyncIterator[Event]:
        """What becomes of a ticket. Raises ApiError if it fails or waits too long."""
        async for event in ticket.events(self.patience):
            yield event


def _follow(pieces: Generator[Piece, None, Answer], llm: SteeredLlama, ticket: Ticket, index: int) -> Answer:
    """Tell an answer's pieces as they come; between two, its dials may move and it may be cancelled."""

    def tell(piece: Piece) -> None:
        if piece.text or piece.choice or piece.readings:
            ticket.tell(Said(index, piece, dict(llm.angles)), may_wait=True)
        ticket.turn(llm)

    return finish_answer(pieces, tell)
