"""A cached token is valid only for the steering state that computed it: after anything, a request has the logits that a
fresh context gives."""

from __future__ import annotations

import pickle
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama, LlamaRAMCache
from numpy.typing import NDArray
from planted import random_steering

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny

from edge_steer.architectures import architecture
from edge_steer.model_file import read_model
from edge_steer.runtime.engines import EngineName
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering

HEAD = list(range(30, 60))  # what a chat template repeats
ONE, OTHER = [*HEAD, 70, 71, 72, 73], [*HEAD, 80, 81]
EXACT: dict[str, Any] = {
    "type_k": llama_cpp.GGML_TYPE_F32,
    "type_v": llama_cpp.GGML_TYPE_F32,
    "n_threads": 1,
    "n_threads_batch": 1,
}


@dataclass(frozen=True)
class Case:
    """A model and the engine that steers it."""

    path: Path
    engine: EngineName


@pytest.fixture(scope="module", params=["llama hook", "gemma3 hook", "llama lora"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, engine = request.param.split()
    return Case(tiny.build(family, tmp_path_factory.mktemp("tiny")).gguf_path, engine)


def steering_for(model: Case, seed: int = 0, name: str = "random") -> Steering:
    file = read_model(model.path)
    sites = architecture(file.architecture).sites(file.block_count)
    return random_steering(file.base, sites, seed=seed, name=name)


def steered(model: Case, angle: float | None = None, **llama: object) -> SteeredLlama:
    made: dict[str, object] = {"engine": model.engine, "n_ctx": 512, **EXACT, **llama}
    return SteeredLlama(model.path, steering=steering_for(model), angle=angle, **made)


def answer(llm: Llama, prompt: list[int], tokens: int = 1) -> tuple[list[int], NDArray[np.float32]]:
    """A greedy answer and the logits that its last token was chosen from."""
    said = []
    stream: Generator[int, Any, None] = llm.generate(prompt, temp=0.0)
    for token in stream:
        said.append(token)
        logits = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).copy()
        if len(said) == tokens:
            break
    stream.close()
    return said, logits


def assert_as_fresh(llm: SteeredLlama, prompt: list[int]) -> None:
    fresh = steered(Case(Path(llm.model_path), llm.engine), llm.angle, scope=llm.scope)
    expected = answer(fresh, prompt)[1]
    np.testing.assert_allclose(answer(llm, prompt)[1], expected, atol=2e-5 * np.ptp(expected))


def evaluated(llm: SteeredLlama, prompt: list[int]) -> int:
    """How many tokens a request evaluates before its answer begins."""
    counts: list[int] = []
    decode = llm._ctx.decode
    llm._ctx.decode = lambda batch: (counts.append(batch.n_tokens()), decode(batch))[1]
    try:
        answer(llm, prompt)
    finally:
        llm._ctx.decode = decode
    return sum(counts)


def test_a_shared_prefix_cached_at_another_angle_is_not_used(model: Case) -> None:
    llm = steered(model, 40.0)
    answer(llm, ONE)
    for angle in (-40.0, None, 40.0, 0.0):
        llm.angle = angle
        assert_as_fresh(llm, OTHER)
        assert_as_fresh(llm, ONE)


def test_the_same_angle_uses_the_shared_prefix(model: Case) -> None:
    llm = steered(model, 40.0)
    answer(llm, ONE)
    assert evaluated(llm, OTHER) == len(OTHER) - len(HEAD)
    llm.angle = None
    assert evaluated(llm, OTHER) == len(OTHER)
    llm.angle = 0.0
    assert evaluated(llm, ONE) == len(ONE) - len(HEAD), "0 degrees and off are one state"


def test_a_dial_moved_during_an_answer_acts_from_the_next_token_and_marks_it(model: Case) -> None:
    llm = steered(model, 40.0)
    said = []
    stream = llm.generate(list(ONE), temp=0.0)
    for token in stream:
        said.append(token)
        if len(said) == 3:
            llm.angle = -60.0
        if len(said) == 6:
            break
    stream.close()
    moved = llm._cache_stamps.save(llm.n_tokens)["states"][len(ONE) :]
    assert moved[:2] == [moved[0]] * 2
    assert moved[2:] == [moved[2]] * len(moved[2:])
    assert moved[0] != moved[2]
    follow_up = [*ONE, *said, 90, 91]
    assert_as_fresh(llm, follow_up)
    llm.angle = 40.0
    assert_as_fresh(llm, follow_up)


def test_a_saved_state_is_used_at_its_own_angle_only(model: Case) -> None:
    llm = steered(model, 40.0)
    answer(llm, ONE)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    for angle in (None, -20.0, 40.0):
        other = steered(model, angle)
        other.load_state(state)
        assert_as_fresh(other, OTHER)
        other.load_state(state)
        assert (evaluated(other, OTHER) < len(OTHER)) == (angle == 40.0)


def test_a_state_saved_by_a_plain_llama_is_used_unsteered_only(model: Case) -> None:
    plain = Llama(str(model.path), n_ctx=512, verbose=False, **EXACT)
    answer(plain, ONE)
    state = plain.save_state()
    for angle in (None, 30.0):
        llm = steered(model, angle)
        llm.load_state(state)
        assert (evaluated(llm, OTHER) < len(OTHER)) == (angle is None)
        assert_as_fresh(llm, ONE)


def test_set_cache_hands_over_no_stale_state(model: Case) -> None:
    llm = steered(model, 40.0)
    llm.set_cache(LlamaRAMCache())
    for angle in (40.0, -40.0, None, 40.0):
        llm.angle = angle
        text = [llm.create_completion(list(ONE), max_tokens=4, temperature=0.0)["choices"][0]["text"] for _ in range(2)]
        fresh = steered(model, angle)
        expected = fresh.create_completion(list(ONE), max_tokens=4, temperature=0.0)["choices"][0]["text"]
        assert text == [expected, expected]
        assert_as_fresh(llm, OTHER)


def test_a_prompt_longer_than_a_batch_and_a_micro_batch_is_right(model: Case) -> None:
    prompt = [40 + i % 50 for i in range(150)]
    for batch, micro in ((32, 32), (64, 16)):
        llm = steered(model, 25.0, n_batch=batch, n_ubatch=micro)
        assert_as_fresh(llm, prompt)
        llm.angle = -25.0
        assert_as_fresh(llm, prompt)


def test_two_dials_are_two_states(model: Case) -> None:
    steerings = [steering_for(model, seed, f"s{seed}") for seed in (1, 2)]
    made: dict[str, object] = {"steering": steerings, "engine": model.engine, "n_ctx": 512, **EXACT}
    llm = SteeredLlama(model.path, angles={"s1": 30, "s2": None}, **made)
    for one, two in ((30, None), (None, 30), (30, 30), (-30, 30)):
        llm.angles = {"s1": one, "s2": two}
        fresh = SteeredLlama(model.path, angles={"s1": one, "s2": two}, **made)
        expected = answer(fresh, ONE)[1]
        np.testing.assert_allclose(answer(llm, ONE)[1], expected, atol=2e-5 * np.ptp(expected))


# --- scope "response" ---------------------------------------------------------------------------------------------


def test_response_steers_the_last_prompt_token_and_the_answer_only(model: Case) -> None:
    """By hand: the head evaluated unsteered, then the last token steered, in one context."""
    by_hand = steered(model, None)
    by_hand.eval(ONE[:-1])
    by_hand.angle = 40.0
    by_hand.eval(ONE[-1:])
    expected = np.ctypeslib.as_array(by_hand._ctx.get_logits_ith(-1), shape=(by_hand.n_vocab(),)).copy()
    llm = steered(model, 40.0, scope="response")
    np.testing.assert_allclose(answer(llm, ONE)[1], expected, atol=2e-5 * np.ptp(expected))


def test_response_evaluates_at_most_one_prompt_token_again_after_a_change_of_angle(model: Case) -> None:
    llm = steered(model, 40.0, scope="response")
    answer(llm, ONE, 3)
    for angle in (-40.0, None, 12.0):
        llm.angle = angle
        assert evaluated(llm, ONE) <= 1
        assert_as_fresh(llm, ONE)


def test_response_keeps_earlier_answers_as_they_were_written(model: Case) -> None:
    llm = steered(model, 40.0, scope="response")
    said, _ = answer(llm, ONE, 5)
    llm.angle = -40.0
    follow_up = [*ONE, *said, 90, 91, 92]
    # Four of the five answer tokens were fed back, steered; the fifth and what follows are new.
    assert evaluated(llm, follow_up) == len(follow_up) - len(ONE) - 4


def test_response_does_not_keep_a_steered_prompt_token_whose_answer_is_gone(model: Case) -> None:
    llm = steered(model, 40.0, scope="response")
    answer(llm, ONE, 4)
    assert_as_fresh(llm, [*ONE, 99, 98])


def test_a_change_of_scope_evaluates_again(model: Case) -> None:
    llm = steered(model, 40.0)
    answer(llm, ONE, 3)
    llm.scope = "response"
    assert_as_fresh(llm, ONE)
    llm.scope = "all"
    assert_as_fresh(llm, ONE)


def test_logits_follow_the_same_rules(model: Case) -> None:
    llm = steered(model, 40.0)
    tokens = [*ONE, 5, 6, 7]
    for scope in ("all", "response"):
        for angle in (40.0, None, -40.0):
            llm.angle, llm.scope = angle, scope
            fresh = steered(model, angle, scope=scope)
            expected = fresh.logits(tokens, len(ONE))
            np.testing.assert_allclose(llm.logits(tokens, len(ONE)), expected, atol=2e-5 * np.ptp(expected))
            assert_as_fresh(llm, OTHER)


def test_random_use_never_differs_from_a_fresh_context(model: Case) -> None:
    rng = np.random.default_rng(0)
    llm = steered(model, 40.0)
    prompts = [ONE, OTHER, HEAD, [*HEAD, *range(40, 90)]]
    states = []
    for _ in range(40):
        llm.angle = [40.0, -40.0, None, 10.0][rng.integers(4)]
        llm.scope = ["all", "all", "response"][rng.integers(3)]
        what = rng.integers(4)
        prompt = list(prompts[rng.integers(len(prompts))])
        if what == 0:
            answer(llm, prompt, int(rng.integers(1, 6)))
        elif what == 1 and llm.n_tokens:
            states.append(llm.save_state())
        elif what == 2 and states:
            llm.load_state(states[rng.integers(len(states))])
        if llm.scope == "all":
            assert_as_fresh(llm, prompt)
