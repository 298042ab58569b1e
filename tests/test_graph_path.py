"""Turning inside llama.cpp's graph, attacked: two models at once, answers left in the middle, forks, closing in any
order, many steerings, odd angles, graphs kept or not, operators fused or not."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import steering_for
from llama_cpp import Llama
from numpy.typing import NDArray

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from devices import EXACT, open_forced, path_forced

from edge_steer import SteerError
from edge_steer.choices import OPERATORS, Operator
from edge_steer.runtime.llama import SteeredLlama

TOKENS = [256, *range(40, 60)]
ONE: dict[str, Any] = {"n_ctx": 256, **EXACT}


def steered(model: Path, angle: float | None, seed: int = 0, way: str = "auto", **how: object) -> SteeredLlama:
    with path_forced(way):
        return SteeredLlama(model, steering=steering_for(model, seed=seed), angle=angle, **ONE | how)


def last_logits(llm: Llama) -> NDArray[np.float32]:
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).copy()


def one_by_one(llm: Llama, tokens: list[int] = TOKENS) -> NDArray[np.float32]:
    """Logits behind each token, evaluated on one kept graph."""
    llm.reset()
    rows = []
    for token in tokens:
        llm.eval([token])
        rows.append(last_logits(llm))
    return np.stack(rows)


def said(llm: Llama, count: int, prompt: list[int] = TOKENS) -> list[int]:
    return list(islice(llm.generate(list(prompt), temp=0.0), count))


# --- several at once --------------------------------------------------------------------------------------------------


def test_two_models_at_two_angles_answer_in_two_threads_as_alone(model: Path) -> None:
    angles = (30.0, None, -80.0, 5.0)

    def answers(llm: SteeredLlama, found: list[object]) -> None:
        for angle in angles * 3:
            llm.angle = angle
            found.append(said(llm, 12))
            found.append(last_logits(llm).tobytes())

    llms = [steered(model, 5, seed) for seed in (0, 1)]
    alone: list[list[object]] = [[], []]
    together: list[list[object]] = [[], []]
    for llm, found in zip(llms, alone, strict=True):
        answers(llm, found)
    threads = [threading.Thread(target=answers, args=pair) for pair in zip(llms, together, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert alone[0] != alone[1]


def test_two_answers_of_two_models_take_turns_token_by_token(model: Path) -> None:
    expected = [said(steered(model, angle, seed), 12) for seed, angle in ((0, 30.0), (1, -80.0))]
    streams = [steered(model, a, s).generate(list(TOKENS), temp=0.0) for s, a in ((0, 30.0), (1, -80.0))]
    found = list(islice(zip(*streams, strict=True), 12))
    assert [list(each) for each in zip(*found, strict=True)] == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_of_a_loaded_model_steers_as_its_parent(model: Path) -> None:
    llm = steered(model, 30)
    llm.eval(TOKENS[:3])
    expected = one_by_one(steered(model, -40.0))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            llm.angle = -40.0
            os.write(writing, b"1" if (one_by_one(llm) == expected).all() else b"0")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"1"
    os.waitpid(child, 0)
    llm.angle = -40.0
    assert (one_by_one(llm) == expected).all()


# --- answers and models that end early --------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_an_answer_left_in_the_middle_goes_on_at_another_angle_as_in_a_fresh_context(model: Path, threads: int) -> None:
    how = {"n_threads": threads, "n_threads_batch": threads}
    llm = steered(model, 30, **how)
    stream = llm.generate(list(TOKENS), temp=0.0)
    first = list(islice(stream, 5))
    stream.close()
    for angle in (-70.0, None, 30.0):
        llm.angle = angle
        assert said(llm, 3, [*TOKENS, *first]) == said(steered(model, angle, **how), 3, [*TOKENS, *first])


def test_models_close_in_any_order_twice_and_during_an_answer(model: Path) -> None:
    expected = said(steered(model, 30), 8)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        llms = [steered(model, 30) for _ in range(3)]
        streams = [llm.generate(list(TOKENS), temp=0.0) for llm in llms]
        for stream in streams:
            next(stream)
        for closed in order:
            llms[closed].close()
            llms[closed].close()
            with pytest.raises(SteerError, match="this answer was left"):
                next(streams[closed])
            for i, llm in enumerate(llms):
                if i not in order[: order.index(closed) + 1]:
                    assert said(llm, 8) == expected
                    streams[i] = llm.generate(list(TOKENS), temp=0.0)
                    next(streams[i])
    llm = steered(model, 30)
    stream = llm.generate(list(TOKENS), temp=0.0)
    next(stream)
    del llm, stream  # collected in the middle of an answer
    gc.collect()
    assert said(steered(model, 30), 8) == expected


# --- dials ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_eight_steerings_at_once_are_turned_as_the_host_path_turns_them(model: Path, operator: Operator) -> None:
    kinds: list[Operator] = [operator, *OPERATORS, "selective", "ablation"]
    every = [steering_for(model, each, seed=i, name=f"s{i}") for i, each in enumerate(kinds)]
    graph, host = (open_forced(model, way, every) for way in ("graph", "host"))
    for off in ((), (0, 3), range(7), range(8)):
        for llm in (graph, host):
            llm.angles = {each.name: None if i in off else 20.0 for i, each in enumerate(every)}
        assert (one_by_one(graph) == one_by_one(host)).all()


def test_no_turn_is_no_turn_to_the_bit_and_whole_turns_are_none(model: Path) -> None:
    plain = one_by_one(Llama(str(model), verbose=False, **ONE))
    llm = steered(model, 30)
    turned = one_by_one(llm)
    assert np.abs(turned - plain).max() > 2e-2 * np.ptp(plain)
    for angle in (0, 0.0, -0.0, None, 360, -720, 1e6 - 1e6 % 360):
        llm.angle = angle
        assert (one_by_one(llm) == plain).all(), angle


def test_a_large_angle_is_its_rest_and_an_infinite_one_is_refused(model: Path) -> None:
    llm = steered(model, 30)
    for angle in (1e6, -1e6, 1e15):
        llm.angle = angle
        found = one_by_one(llm)
        assert np.isfinite(found).all()
        assert (found == one_by_one(steered(model, angle, way="host"))).all()
        llm.angle = float(np.fmod(angle, 360))
        assert np.abs(found - one_by_one(llm)).max() <= 1e-5 * np.ptp(found)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(SteerError, match="finite number"):
            llm.angle = bad


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_graphs_that_are_not_kept_are_turned_as_those_that_are(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.build(family, tmp_path).gguf_path
    llms = [steered(path, 30)]
    monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", "1")
    llms += [steered(path, 30), steered(path, 30, way="stop")]
    for angle in (30.0, None, -50.0):
        for llm in llms:
            llm.angle = angle
        kept, anew, stopping = map(one_by_one, llms)
        assert (kept == anew).all()
        assert (kept == stopping).all()


UNFUSED = """
import sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_graph_path import one_by_one, steered
rows = [one_by_one(steered(Path(sys.argv[1]), 30, way=way)) for way in ("graph", "stop", "auto")]
assert (rows[0] == rows[1]).all() and (rows[0] == rows[2]).all()
sys.stdout.buffer.write(rows[0].tobytes())
"""


def test_a_norm_and_its_weight_are_turned_alike_whether_ggml_fuses_them_or_not(model: Path) -> None:
    found = []
    for value in ({}, {"GGML_CPU_DISABLE_FUSION": "1"}):
        command = [sys.executable, "-c", UNFUSED, str(model), str(Path(__file__).parent)]
        ran = subprocess.run(command, capture_output=True, env={**os.environ, **value}, check=False)
        assert ran.returncode == 0, ran.stderr.decode()
        found.append(np.frombuffer(ran.stdout, np.float32))
    assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.ptp(found[0])
    assert (found[0] == one_by_one(steered(model, 30)).ravel()).all()
