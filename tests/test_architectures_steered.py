"""Architectures, tiny and random: what the hook turns inside llama.cpp's graph is what torch hooks turn, at every site
and in the logits."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from planted import DIAL

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
import torch
from command import steering_for
from devices import EXACT, path_forced

from edge_steer.architectures import MODEL_TYPES, architecture
from edge_steer.choices import OPERATORS, Operator
from edge_steer.runtime.hook import Record
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.sites import Site, site_of_module
from edge_steer.steering import Steering

TOKENS = [256, *range(40, 70)]
FAMILIES = sorted({*tiny.FAMILIES, *tiny.STEERED_ONLY})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiny.TinyModel]:
    folder = tmp_path_factory.mktemp("tiny")
    return {family: tiny.build(family, folder) for family in FAMILIES}


def opened(model: tiny.TinyModel, steering: Steering, dial: float, way: str = "auto") -> SteeredLlama:
    with path_forced(way):
        return SteeredLlama(model.gguf_path, steering=steering, angle=dial, n_ctx=256, **EXACT)


def torch_rows(model: tiny.TinyModel, steering: Steering, dial: float) -> dict[Site, NDArray[np.float32]]:
    """The last token's activation at every site, under the steering, before it is turned there itself."""
    loaded = tiny._loaded(model.hf_dir)
    known = architecture(MODEL_TYPES[loaded.config.model_type])
    rows: dict[Site, NDArray[np.float32]] = {}

    def keep(site: Site) -> object:
        def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
            rows[site] = output[0, -1].numpy().copy()

        return hook

    modules = {site_of_module(known, name): module for name, module in loaded.named_modules()}
    handles = [modules[site].register_forward_hook(keep(site)) for site in steering.steered]  # before those that turn
    try:
        tiny.torch_logits(model.hf_dir, TOKENS, [(steering, dial)])
    finally:
        for handle in handles:
            handle.remove()
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_an_activation_at_every_site_is_torch_s(models: dict[str, tiny.TinyModel], family: str) -> None:
    """Recorded at stops, of a token that attends to others whose sites were turned inside the graph."""
    model = models[family]
    steering = steering_for(model.gguf_path)
    llm = opened(model, steering, 30.0)
    record = Record.zeros(len(llm.hook_sites), tiny.WIDTH)
    llm.eval(TOKENS[:-1])
    assert llm._hook.went_inside
    with llm.recording(record):
        llm.eval(TOKENS[-1:])
    expected = torch_rows(model, steering, 30.0)
    assert len(expected) == len(steering.steered)
    for site, row in expected.items():
        found = record.rows[llm.hook_sites.index(site), 0]
        assert np.abs(found - row).max() <= 1e-3 * np.abs(row).max(), site


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("family", sorted(tiny.STEERED_ONLY))
def test_the_logits_are_torch_s_and_those_of_stopping(
    models: dict[str, tiny.TinyModel], family: str, operator: Operator
) -> None:
    model, dial = models[family], DIAL[operator]
    steering = steering_for(model.gguf_path, operator)
    found, stopping = (opened(model, steering, dial, way).logits([*TOKENS, 0], 1) for way in ("auto", "stop"))
    assert (found == stopping).all()
    expected = tiny.torch_logits(model.hf_dir, TOKENS, [(steering, dial)])
    unsteered = tiny.torch_logits(model.hf_dir, TOKENS)
    reach = float(np.ptp(expected))
    assert np.abs(found - expected).max() <= 1e-3 * reach
    assert np.abs(unsteered - expected).max() > 2e-2 * reach
