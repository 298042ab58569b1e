"""One cache has one answer: what an abandoned stream, another thread or a closed model leaves behind harms no other."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import steering_for
from llama_cpp import LogitsProcessorList

pytest.importorskip("torch")
import tiny

from edge_steer import SteerError
from edge_steer.runtime.llama import SteeredLlama

ONE: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "n_ctx": 256}
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
# Llama's own loop goes on from token to token where there is a processor, SteeredLlama's where there is none.
LOOPS = [{}, {"logits_processor": LogitsProcessorList([lambda _, scores: scores])}]


def steered(model: Path) -> SteeredLlama:
    return SteeredLlama(model, steering=steering_for(model), angle=20, scope="response", **ONE)


def text(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


@pytest.mark.parametrize("how", LOOPS)
def test_a_stream_that_is_closed_late_does_not_disturb_the_next(model: Path, how: dict[str, Any]) -> None:
    prompt = [256, *range(70, 80)]
    expected = list(islice(steered(model).generate(prompt, temp=0, **how), 12))
    llm = steered(model)
    first = llm.generate([256, 90, 91], temp=0, **how)
    next(first)
    found = []
    for token in islice(llm.generate(prompt, temp=0, **how), 12):
        found.append(token)
        if len(found) == 3:
            first.close()
    assert found == expected


@pytest.mark.parametrize("how", LOOPS)
@pytest.mark.parametrize("between", [
    lambda llm: llm.create_completion("other text", **GREEDY),
    lambda llm: llm.logits([256, 70, 80], 1),
])  # fmt: skip
def test_an_answer_that_was_left_for_another_does_not_go_on_in_the_other_s_cache(
    model: Path, how: dict[str, Any], between: Any
) -> None:
    llm = steered(model)
    left = llm.create_completion("hello", stream=True, **GREEDY, **how)
    next(left)
    between(llm)
    with pytest.raises(SteerError, match="this answer was left"):
        list(left)
    assert text(llm.create_completion("hello", **GREEDY)) == text(steered(model).create_completion("hello", **GREEDY))


def test_threads_that_share_a_model_get_a_whole_answer_or_an_error(model: Path) -> None:
    llm, expected = steered(model), text(steered(model).create_completion("hello there", **GREEDY))
    found: list[str] = []

    def ask() -> None:
        for _ in range(5):
            try:
                found.append(text(llm.create_completion("hello there", **GREEDY)))
            except SteerError as error:
                assert "this answer was left" in str(error)  # noqa: PT017

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {expected}


def test_a_closed_model_says_so(model: Path) -> None:
    llm = steered(model)
    stream = llm.create_completion("hello", stream=True, **GREEDY)
    next(stream)
    llm.close()
    llm.close()
    for use in (
        lambda: llm.create_completion("hello"),
        lambda: llm.create_chat_completion(messages=[{"role": "user", "content": "hello"}]),
        lambda: next(llm.generate([256, 70])),
        lambda: llm.eval([256, 70]),
        lambda: llm.logits([256, 70], 1),
        lambda: llm.tokenize(b"hello"),
        lambda: llm.detokenize([70]),
        lambda: llm.n_ctx(),
        lambda: llm.token_bos(),
        lambda: llm.save_state(),
    ):
        with pytest.raises(SteerError, match=r"open model, got one after close\(\)"):
            use()
    with pytest.raises(SteerError, match="this answer was left"):
        list(stream)


def test_no_prompt_is_an_error_and_no_assertion(model: Path) -> None:
    with pytest.raises(SteerError, match="at least one token"):
        next(steered(model).generate([]))


@pytest.mark.parametrize("token", [-1, 288, 999_999])
def test_a_token_that_the_vocabulary_lacks_is_an_error_and_no_end_of_the_process(model: Path, token: int) -> None:
    with pytest.raises(SteerError, match=f"from 0 to 287, got {token}"):
        steered(model).detokenize([70, token])


def test_a_window_that_has_moved_on_is_never_looked_back_to(tmp_path: Path) -> None:
    path = tiny.build("gemma3", tmp_path).gguf_path
    how = {**ONE, "n_ctx": 512, "n_batch": 16, "n_ubatch": 16, "swa_full": False, "type_k": 0, "type_v": 0}
    drawn = np.random.default_rng(0).integers(0, 200, 420).tolist()
    long, llm = [256, *drawn[:400]], SteeredLlama(path, **how)
    for keep in (400, 390, 300, 100, 5):
        llm.logits(long, 380)
        other = [*long[:keep], *drawn[400:]]
        fresh = SteeredLlama(path, **how)
        assert np.abs(llm.logits(other, keep + 2) - fresh.logits(other, keep + 2)).max() < 1e-3
        next(llm.generate(long, temp=0))
        for each in (llm, fresh):
            next(each.generate(other, temp=0))
        rows = [np.ctypeslib.as_array(each._ctx.get_logits(), shape=(each.n_vocab(),)).copy() for each in (llm, fresh)]
        assert np.abs(rows[0] - rows[1]).max() < 1e-3
