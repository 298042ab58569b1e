"""The ways to a tensor's memory: by the node that computes it, in place, on its device, by copying. Here the device is
the CPU's own; test_rpc.py has devices whose memory is elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from devices import EXACT, TOLERANCE, logits_by_batch, open_forced, path_forced, steerings_for

from edge_steer.choices import OPERATORS, Operator
from edge_steer.model_file import read_model
from edge_steer.runtime.hook import Record
from edge_steer.runtime.llama import SteeredLlama


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_way_gives_the_same_logits(model: Path, operator: Operator, count: int) -> None:
    steerings = steerings_for(model, operator, count)
    host = open_forced(model, "host", steerings)
    others = [open_forced(model, way, steerings) for way in ("graph", "device", "copy")]
    plain = SteeredLlama(model, steering=(), n_ctx=768, **EXACT)
    for unsteered, expected, *found in zip(*map(logits_by_batch, (plain, host, *others)), strict=True):
        reach = float(np.ptp(expected))
        assert np.abs(unsteered - expected).max() > 2e-2 * reach
        for each in found:
            assert np.abs(each - expected).max() <= TOLERANCE * reach
        assert (found[0] == expected).all(), "the graph does what the host path does"
    assert [(each._hook.turned == host._hook.turned).all() for each in others] == [True, True, True]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_the_graph_turns_on_several_threads_what_the_host_path_turns(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny.build(family, tmp_path_factory.mktemp("tiny")).gguf_path
    steerings = steerings_for(path, "adaptive", 3)
    threads = {"n_threads": 3, "n_threads_batch": 3}
    host, graph = (open_forced(path, way, steerings, **threads) for way in ("host", "graph"))
    for expected, found in zip(logits_by_batch(host), logits_by_batch(graph), strict=True):
        assert (found == expected).all()


def test_a_kept_graph_follows_the_dial(model: Path) -> None:
    """llama.cpp keeps its graph from token to token: a node that was changed for one must not turn the next."""
    (steering,) = steerings_for(model, "selective", 1)
    host, auto = (open_forced(model, way, [steering]) for way in ("host", "auto"))
    tokens = [256, *range(40, 60)]
    for angle in (30.0, None, 30.0, -20.0, None):
        found = []
        for llm in (host, auto):
            llm.angle = angle
            llm.reset()
            for token in tokens:  # one by one, on one graph
                llm.eval([token])
            found.append(np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy())
            record = Record.zeros(len(llm.hook_sites), 64)
            llm.observe([*tokens, 70], record, steered=True)
            found.append(record.rows)
        assert (found[0] == found[2]).all()
        assert (found[1] == found[3]).all()


def test_a_new_dial_reaches_the_device(model: Path) -> None:
    (steering,) = steerings_for(model, "adaptive", 1)
    host, device = (open_forced(model, way, [steering]) for way in ("host", "device"))
    seen = []
    for angle in (10, 200, None, -40, 10):
        for llm in (host, device):
            llm.angle = angle
        expected, found = (llm.logits([256, *range(40, 60), 0], 1) for llm in (host, device))
        assert np.abs(found - expected).max() <= TOLERANCE * np.ptp(expected)
        seen.append(found)
    assert (seen[0] == seen[4]).all()
    assert np.abs(seen[0] - seen[1]).max() > 1e-2 * np.ptp(seen[0])


def test_a_steering_that_is_off_has_no_node_on_the_device(model: Path) -> None:
    steerings = steerings_for(model, "standard", 3)
    host, device = (open_forced(model, way, steerings) for way in ("host", "device"))
    for llm in (host, device):
        llm.angles[steerings[0].name] = None
        llm.angles[steerings[2].name] = None
    for expected, found in zip(logits_by_batch(host), logits_by_batch(device), strict=True):
        assert np.abs(found - expected).max() <= TOLERANCE * np.ptp(expected)


@pytest.mark.parametrize("way", ["device", "copy"])
def test_every_way_records_the_same(model: Path, way: str) -> None:
    width = read_model(model).embedding_length
    found = []
    for each in ("host", way):
        with path_forced(each):
            llm = SteeredLlama(model, steering=(), n_ctx=768, **EXACT)
        record = Record.zeros(len(llm.hook_sites), width)
        llm.observe([256, *(30 + i % 200 for i in range(600))], record)
        llm.observe([256, 50], record)
        found.append(record)
    np.testing.assert_array_equal(found[0].sum, found[1].sum)
    np.testing.assert_array_equal(found[0].count, found[1].count)
    assert (found[0].count == 2).all()


def test_recording_and_turning_at_once_records_what_was_there_before(model: Path) -> None:
    steerings = steerings_for(model, "selective", 1)
    records = []
    for way in ("host", "device", "copy"):
        llm = open_forced(model, way, steerings)
        record = Record.zeros(len(llm.hook_sites), 64)
        llm._hook.record(record)
        llm.eval([256, 40, 50])
        llm._hook.record(None)
        assert llm.sites_hit == len(steerings[0].steered)
        records.append(record.rows)
    for each in records[1:]:
        assert np.abs(each - records[0]).max() <= TOLERANCE * np.abs(records[0]).max()
