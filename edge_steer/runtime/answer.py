"""One answer: tokens from a SteeredLlama, as text that stops where it should.

Every answer goes this way: those of the command line, of the chat and of the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import LogitsProcessorList
from llama_cpp.llama_grammar import LlamaGrammar
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.measure.metrics import log_softmax
from edge_steer.runtime.answer_text import AnswerText
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.reading import cut_unread


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when an answer ends. temperature 0 is greedy; max_tokens is per answer.

    stop: texts that end an answer and are not part of it. logit_bias: added to the logits of these tokens.
    grammar: GBNF that the answer obeys, from the rule `root`. log_probabilities: how many of the likeliest tokens are
    told of beside each that is chosen; None: nothing is told. read: names of the steerings that are read.
    """

    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    repeat_penalty: float = 1.1
    max_tokens: int = 256
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str | None = None
    log_probabilities: int | None = None
    read: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenChoice:
    """A token that was chosen, and how likely the model held it, before any sampling."""

    token: int
    log_probability: float
    likeliest: tuple[tuple[int, float], ...]  # tokens and log-probabilities, most likely first


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer. Its text may be "": half a character, or perhaps the head of a stop text."""

    text: str
    choice: TokenChoice | None = None  # where log-probabilities are asked for
    readings: Mapping[str, float] | None = None  # of this token, by steering, where they are asked for


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost. `generated_tokens` counts no end-of-answer token; `seconds` run from the first
    token to the last, so that the prompt is not in them. finish: "stop", or "length" where max_tokens or the context
    ended it. prompt_readings, readings: of the prompt's and of the generated tokens, by steering, where asked for."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    finish: str = "stop"
    prompt_readings: Mapping[str, NDArray[np.float32]] | None = field(default=None, compare=False)
    readings: Mapping[str, NDArray[np.float32]] | None = field(default=None, compare=False)

    @property
    def tokens_per_second(self) -> float:
        return (self.generated_tokens - 1) / self.seconds if self.seconds > 0 else 0.0


def stream_pieces(
    llm: SteeredLlama, prompt: Sequence[int], sampling: Sampling, *, strip: bool = False
) -> Generator[Piece, None, Answer]:
    """Yields the answer to a prompt's tokens, a piece a token; returns it whole. Closing the generator stops it.

    strip: leave out blanks at the head: a chat template that ends without a space leaves it to the model.
    Where `sampling.read` asks for readings, a piece comes one token late: a token is read as it is evaluated, for the
    token behind it. Raises SteerError if the prompt fills the context, the grammar is none, or a steering cannot be
    read.
    """
    check_room(llm, prompt)
    with llm.token_readings.of(sampling.read):
        if not sampling.read:
            return (yield from _pieces(llm, prompt, sampling, strip))
        with llm.without_answer():
            cut_unread(llm, prompt, sampling.read)
        answer = yield from _read(llm, _pieces(llm, prompt, sampling, strip), len(prompt), sampling.read)
        at = {name: llm.token_readings.first(name, len(prompt) + answer.generated_tokens) for name in sampling.read}
        begun = len(prompt)
        return replace(
            answer,
            prompt_readings={name: found[:begun] for name, found in at.items()},
            readings={name: found[begun:] for name, found in at.items()},
        )


class Whole:
    """An answer's pieces as they come, and `answer` behind the last of them; to be closed where it is left early."""

    answer: Answer

    def __init__(self, pieces: Generator[Piece, None, Answer]) -> None:
        self._pieces = self._follow(pieces)

    def _follow(self, pieces: Generator[Piece, None, Answer]) -> Generator[Piece, None, None]:
        with closing(pieces):
            self.answer = yield from pieces

    def __iter__(self) -> Generator[Piece, None, None]:
        return self._pieces

    def close(self) -> None:
        self._pieces.close()


def finish_answer(pieces: Generator[Piece, None, Answer], take: Callable[[Piece], object]) -> Answer:
    """The whole answer of `pieces`, each of which is given to `take`. Closes them, also where `take` raises."""
    with closing(Whole(pieces)) as whole:
        for piece in whole:
            take(piece)
        return whole.answer


def _read(
    llm: SteeredLlama, pieces: Generator[Piece, None, Answer], begun: int, names: Sequence[str]
) -> Generator[Piece, None, Answer]:
    """`pieces`, each with the readings of its token, and so when the next has come. begun: where the answer begins."""
    held: Piece | None = None
    place = begun - 1  # of the token that is held
    with closing(Whole(pieces)) as whole:
        for piece in whole:
            if held is not None:
                yield replace(held, readings={name: llm.token_readings.at(name, place) for name in names})
            held, place = piece, place + 1
    answer = whole.answer
    if held is not None:
        read = place < begun + answer.generated_tokens  # else it is the rest of the text, of no token
        yield replace(held, readings={name: llm.token_readings.at(name, place) for name in names}) if read else held
    return answer


def _pieces(
    llm: SteeredLlama, prompt: Sequence[int], sampling: Sampling, strip: bool
) -> Generator[Piece, None, Answer]:
    """An answer as `stream_pieces` yields it, without readings; but with `sampling.read`, its last token is evaluated
    too."""
    most = min(sampling.max_tokens, llm.n_ctx() - len(prompt))
    text = AnswerText(sampling.stop, strip)
    count, first, last = 0, 0.0, 0.0
    finish = "stop"
    llm.set_seed(sampling.seed)
    with closing(llm.generate(prompt, **_generate_options(llm, sampling))) as tokens:
        for token in tokens:
            piece = llm.piece(token)
            if piece is None:
                break
            last = time.perf_counter()
            first = first or last
            count += 1
            choice = None if sampling.log_probabilities is None else _choice(llm, token, sampling.log_probabilities)
            yield Piece(text.add(piece), choice)
            if text.stopped or count == most:
                finish = "stop" if text.stopped else "length"
                if sampling.read:
                    llm.eval([token])
                break
    if rest := text.end():
        yield Piece(rest)
    return Answer(text.text, len(prompt), count, last - first, finish)


def check_room(llm: SteeredLlama, prompt: Sequence[int]) -> None:
    """Raise SteerError if a prompt leaves no room for an answer."""
    if len(prompt) >= llm.n_ctx():
        raise SteerError(
            f"expected a prompt of less than {llm.n_ctx()} tokens, the context, got {len(prompt)}; {llm.longer()}"
        )


def _choice(llm: SteeredLlama, token: int, count: int) -> TokenChoice:
    """What the model held of `token`, which was just chosen, and of the `count` likeliest."""
    row = log_softmax(llm.last_logits()[None])[0]
    order = np.argsort(-row, kind="stable")[:count]
    return TokenChoice(token, float(row[token]), tuple((int(each), float(row[each])) for each in order))


def _generate_options(llm: SteeredLlama, sampling: Sampling) -> dict[str, Any]:
    """What Llama.generate takes."""
    found: dict[str, Any] = {
        "temp": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty, "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
    }  # fmt: skip
    if sampling.logit_bias:
        found["logits_processor"] = LogitsProcessorList([_add_bias(llm, sampling.logit_bias)])
    if sampling.grammar is not None:
        found["grammar"] = _grammar(llm, sampling.grammar)
    return found


def _add_bias(llm: SteeredLlama, bias: Mapping[int, float]) -> Callable[[Any, NDArray[np.float32]], Any]:
    tokens = np.fromiter(bias, np.int64, len(bias))
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < llm.n_vocab()):
        raise SteerError(
            f"expected tokens from 0 to {llm.n_vocab() - 1} in logit_bias, got {tokens.min()}…{tokens.max()}"
        )
    amounts = np.fromiter(bias.values(), np.float32, len(bias))

    def add(_: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = logits.copy()
        found[tokens] += amounts
        return found

    return add


def _grammar(llm: SteeredLlama, text: str) -> LlamaGrammar:
    """A grammar that llama.cpp parses: llama-cpp-python would sample with a null pointer for one that it refuses."""
    sampler = llama_cpp.llama_sampler_init_grammar(llm._model.vocab, text.encode(), b"root")
    if not sampler:
        raise SteerError("expected a grammar in llama.cpp's GBNF with a rule `root`, got one that it does not parse")
    llama_cpp.llama_sampler_free(sampler)
    return LlamaGrammar.from_string(text, verbose=False)
