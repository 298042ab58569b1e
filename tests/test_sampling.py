"""The sampler of SteeredLlama chooses llama.cpp's tokens, and leaves the logits as it found them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama, LlamaGrammar, LogitsProcessorList, StoppingCriteriaList

pytest.importorskip("torch")
pytest.importorskip("transformers")


from edge_steer.runtime.llama import SteeredLlama

SMALL: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "seed": 7}
PROMPT = [256, 40, 50, 60]


def said(llm: Llama, tokens: int = 100, **how: Any) -> list[int]:
    stream: Iterator[int] = llm.generate(list(PROMPT), **how)
    return list(itertools.islice(stream, tokens))


def forbid_even(_: Any, logits: Any) -> Any:
    logits[::2] = -np.inf
    return logits


@pytest.mark.parametrize("last", [64, 5, 0, -1])
@pytest.mark.parametrize(
    "how",
    [
        {"temp": 0.0},
        {"temp": 0.0, "repeat_penalty": 1.3},
        {"temp": 0.0, "repeat_penalty": 0.0},
        {"temp": 0.0, "frequency_penalty": 0.7, "presence_penalty": 1.5},
        {"temp": 0.9, "repeat_penalty": 1.1},
        {"temp": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": -0.5},
        {"temp": -1.0, "repeat_penalty": 1.1},
        {"temp": 0.8, "mirostat_mode": 2, "repeat_penalty": 1.1},
        {"temp": 0.0, "repeat_penalty": 1.2, "logits_processor": LogitsProcessorList([forbid_even])},
        {"temp": 0.0, "repeat_penalty": 1.2, "grammar": 'root ::= [a-e ]*'},
        {"temp": 0.8, "repeat_penalty": 1.2, "grammar": 'root ::= [a-e ]*'},
    ],
    ids=lambda how: " ".join(map(str, how)),
)  # fmt: skip
def test_tokens_are_those_of_a_plain_llama(model: Path, how: dict[str, Any], last: int) -> None:
    if "grammar" in how:
        how = how | {"grammar": LlamaGrammar.from_string(how["grammar"], verbose=False)}
    plain, steered = (made(str(model), last_n_tokens_size=last, **SMALL) for made in (Llama, SteeredLlama))
    expected = said(plain, **how)
    assert len(set(expected)) > 1
    assert said(steered, **how) == expected


def test_penalties_change_what_is_said(model: Path) -> None:
    llm = SteeredLlama(model, **SMALL)
    assert said(llm, temp=0.0) != said(llm, temp=0.0, repeat_penalty=1.3)


@pytest.mark.parametrize("temp", [0.0, 0.9])
def test_logits_are_left_as_they_were(model: Path, temp: float) -> None:
    llm = SteeredLlama(model, **SMALL)
    llm.eval(PROMPT)
    logits = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),))
    before = logits.copy()
    sampler = llm._init_sampler(temp=temp, repeat_penalty=1.5, frequency_penalty=0.5)
    chosen = [sampler.sample(llm._ctx) for _ in range(20)]
    assert len(set(chosen)) > 1, "penalties must have acted"
    assert (logits == before).all()


def test_tokens_sent_to_an_answer_are_taken_up(model: Path) -> None:
    llm, other = SteeredLlama(model, **SMALL), SteeredLlama(model, **SMALL)
    answer = llm.generate(list(PROMPT), temp=0.0)
    first = next(answer)
    assert answer.send([70, 80]) == next(other.generate([*PROMPT, first, 70, 80], temp=0.0))
    assert llm.n_tokens == len(PROMPT) + 3


def test_a_stopping_criterion_ends_an_answer_as_in_llama(model: Path) -> None:
    def long_enough(tokens: Any, _: Any) -> bool:
        return len(tokens) >= len(PROMPT) + 5

    found = [
        said(made(str(model), **SMALL), temp=0.0, stopping_criteria=StoppingCriteriaList([long_enough]))
        for made in (Llama, SteeredLlama)
    ]
    assert found[0] == found[1]
    assert 0 < len(found[0]) < 6
