"""A llama.cpp in which turning inside the graph goes wrong still steers: the model notices as it is loaded, and stops
at its sites instead."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from ctypes import c_int, c_int32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import steering_for
from llama_cpp._internals import LlamaContext
from planted import DIAL, random_steering

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from devices import path_forced

from edge_steer.architectures import architecture
from edge_steer.choices import OPERATORS, Operator
from edge_steer.model_file import read_model
from edge_steer.runtime import native
from edge_steer.runtime.dials import FILE_DEFAULT
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.sites import Site

ONE: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "n_ctx": 256}
TOKENS = [256, *range(40, 60), 0]
WARNING = "gives other logits than stopping at every site"

Operation = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_int, c_void_p)


# --- graphs that do something else than edge-steer asks ---------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]) -> None:
    """Hooks that are made from now on know another ggml: `change` is given their own steer_graph_ggml."""
    true = native.bound_ggml()
    graph = native.GraphGgml.from_buffer_copy(native.GraphGgml.from_address(true.graph))
    kept = change(graph)
    other = type(true).from_buffer_copy(true)
    other.graph, other.kept = ctypes.addressof(graph), (true, graph, kept)
    monkeypatch.setattr(native, "bound_ggml", lambda: other)


def exchange_operators(graph: Any) -> None:
    graph.op_mul, graph.op_add = graph.op_add, graph.op_mul


def leave_unturned(*sites: Site, layers: int = tiny.LAYERS) -> Callable[[Any], object]:
    """As a llama.cpp that computes some of a Llama's sites itself; none given: all of them."""
    known = architecture("llama")
    every = known.sites(layers, ",".join(known.kinds))
    left = [every.index(site) for site in sites]

    def change(graph: Any) -> object:
        true, lib = native.bound_ggml(), native.library()
        data = ctypes.CFUNCTYPE(c_void_p, c_void_p)(true.ggml_get_data)
        count = ctypes.CFUNCTYPE(ctypes.c_int64, c_void_p)(true.ggml_nelements)
        turn = Operation(ctypes.cast(lib.steer_in_graph, c_void_p).value or 0)

        def values(tensor: int) -> Any:
            return np.ctypeslib.as_array((ctypes.c_float * count(tensor)).from_address(data(tensor)))

        @Operation
        def compute(node: int, thread: int, threads: int, inside: int) -> None:
            site, adds = c_int32.from_address(inside + 8).value, ctypes.c_bool.from_address(inside + 12).value
            if left and site not in left:
                turn(node, thread, threads, inside)
                return
            a, b = (values(c_void_p.from_address(node + graph.source_offset + 8 * i).value or 0) for i in (0, 1))
            wide = np.resize(b, a.shape)
            values(node)[:] = a + wide if adds else a * wide

        address = ctypes.cast(compute, c_void_p).value or 0
        graph.custom_params[:8] = list(address.to_bytes(8, "little"))
        return compute

    return change


FAULTS = {
    "another operator": exchange_operators,
    "no site turned": leave_unturned(),
    "the first site not turned": leave_unturned(Site(0, "attn_norm")),
    "the last site not turned": leave_unturned(Site(2, "ffn_norm")),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_that_goes_wrong_is_noticed_and_the_model_is_steered_all_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    steering = steering_for(model)
    right = {}
    for angle in (None, 20.0, -70.0):
        right[angle] = SteeredLlama(model, steering=steering, angle=angle, **ONE).logits(TOKENS, 1)
    plant(monkeypatch, FAULTS[fault])
    with path_forced("graph"):  # the fault is one: nothing else notices it
        wrong = SteeredLlama(model, steering=steering, angle=20, **ONE)
        assert np.abs(wrong.logits(TOKENS, 1) - right[20.0]).max() > 1e-2 * np.ptp(right[20.0])
    with pytest.warns(UserWarning, match=WARNING) as said:
        llm = SteeredLlama(model, steering=steering, angle=None, **ONE)  # off as it is loaded, on later
    assert [str(each.message).count("\n") for each in said] == [0]
    assert said[0].filename == __file__
    assert llm.sites_hit == 0
    for angle in (None, 20.0, -70.0, 20.0):
        llm.angle = angle
        assert (llm.logits(TOKENS, 1) == right[angle]).all()
    assert llm.sites_hit == 6


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_looked_at(model: Path, monkeypatch: pytest.MonkeyPatch, operator: Operator) -> None:
    steering = steering_for(model, operator)
    expected = SteeredLlama(model, steering=steering, angle=DIAL[operator], **ONE).logits(TOKENS, 1)
    plant(monkeypatch, leave_unturned(Site(1, "ffn_norm")))
    with pytest.warns(UserWarning, match=WARNING):
        llm = SteeredLlama(model, steering=steering, angle=DIAL[operator], **ONE)
    assert (llm.logits(TOKENS, 1) == expected).all()


def test_a_site_of_one_steering_among_several_is_looked_at(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [steering_for(model, seed=i, name=f"s{i}") for i in range(8)]
    one = [each.with_(mask=np.arange(6) == 4 if i == 6 else np.arange(6) < 2) for i, each in enumerate(every)]
    plant(monkeypatch, leave_unturned(one[6].steered[0]))
    with pytest.warns(UserWarning, match=WARNING):
        SteeredLlama(model, steering=one, angles={each.name: None for each in one}, **ONE)


@pytest.mark.parametrize("kinds", ["attn_norm", "layer_out"])
def test_one_site_of_a_real_model_is_noticed(smollm2: Path, monkeypatch: pytest.MonkeyPatch, kinds: str) -> None:
    file = read_model(smollm2)
    steered = architecture(file.architecture).sites(file.block_count, kinds)
    steering = random_steering(file.base, steered)
    for missed in (steered[1], steered[-1]):
        with monkeypatch.context() as patch:
            plant(patch, leave_unturned(missed, layers=file.block_count))
            with pytest.warns(UserWarning, match=WARNING):
                SteeredLlama(smollm2, steering=steering, angle=None, **ONE)


# --- graphs that are as they should be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{}, {"n_batch": 1, "n_ubatch": 1}, {"n_threads": 2, "n_threads_batch": 2}, {"flash_attn": True}]
)
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_good_graph_is_used_without_a_word(family: str, how: dict[str, Any], tmp_path: Path) -> None:
    path = tiny.build(family, tmp_path).gguf_path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = SteeredLlama(path, steering=steering_for(path), angle=20, **ONE | how)
    assert (llm._hook.path, llm._hook.went_inside) == ("auto", True)
    with path_forced("stop"):
        other = SteeredLlama(path, steering=steering_for(path), angle=20, **ONE | how)
    assert (llm.logits(TOKENS, 1) == other.logits(TOKENS, 1)).all()
    assert not other._hook.went_inside


def test_of_a_vocabulary_alone_nothing_is_looked_at(model: Path) -> None:
    llm = SteeredLlama(model, steering=steering_for(model), angle=30.0, vocab_only=True, verbose=False)
    assert llm.detokenize(llm.tokenize(b"Hello")) == b"Hello"


def test_a_model_that_was_looked_at_is_as_fresh(model: Path) -> None:
    steering = steering_for(model)
    for how in ({"logits_all": True}, {}):
        llm = SteeredLlama(model, steering=steering, angle=20, **ONE | how)
        with path_forced("stop"):
            other = SteeredLlama(model, steering=steering, angle=20, **ONE | how)
        assert llm._hook.went_inside
        assert (llm.n_tokens, llm._requires_eval, llm.sites_hit) == (other.n_tokens, other._requires_eval, 0)
        assert not llm._hook.reached.any()
        states = [each.save_state() for each in (llm, other)]
        assert states[0].llama_state == states[1].llama_state
        for each in (llm, other):
            each.eval(TOKENS)
        states = [each.save_state() for each in (llm, other)]
        assert states[0].llama_state == states[1].llama_state
        assert (llm.input_ids[: len(TOKENS)] == TOKENS).all()
        if how:
            assert (states[0].scores == states[1].scores).all()


@pytest.mark.parametrize(
    ("way", "how", "decoded"),
    [
        ("auto", {}, [2, 2]), ("auto", {"steering": (), "angle": FILE_DEFAULT}, []),
        ("auto", {"engine": "lora"}, []), ("stop", {}, []), ("host", {}, []), ("graph", {}, []),
    ],
)  # fmt: skip
def test_it_costs_two_tokens_twice_and_nothing_where_the_graph_is_not_used(
    model: Path, monkeypatch: pytest.MonkeyPatch, way: str, how: dict[str, Any], decoded: list[int]
) -> None:
    counts: list[int] = []
    decode = LlamaContext.decode
    monkeypatch.setattr(
        LlamaContext, "decode", lambda self, batch: (counts.append(batch.n_tokens()), decode(self, batch))[1]
    )
    with path_forced(way):
        SteeredLlama(model, **{"steering": steering_for(model), "angle": None, **ONE} | how)
    assert counts == decoded
