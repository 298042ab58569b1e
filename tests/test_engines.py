"""llama.cpp with the hook against transformers with torch forward hooks, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from planted import DIAL, random_steering

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny

from edge_steer.architectures import architecture
from edge_steer.choices import OPERATORS, Operator
from edge_steer.converters.quantize import quantize_file
from edge_steer.model_file import read_model
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering

TOKENS = [256, *range(40, 100)]
EXACT: dict[str, Any] = {
    "type_k": llama_cpp.GGML_TYPE_F32,
    "type_v": llama_cpp.GGML_TYPE_F32,
    "n_threads": 1,
    "n_threads_batch": 1,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiny.TinyModel]:
    folder = tmp_path_factory.mktemp("tiny")
    return {family: tiny.build(family, folder) for family in tiny.FAMILIES}


def steering_for(model: tiny.TinyModel, operator: Operator, sites: str = "pre", **kwargs: object) -> Steering:
    file = read_model(model.gguf_path)
    chosen = architecture(file.architecture).sites(file.block_count, sites)
    return random_steering(file.base, chosen, operator, **kwargs)  # type: ignore[arg-type]


def assert_same_logits(model: tiny.TinyModel, actions: list[tuple[Steering, float | None]], **llama: object) -> None:
    """Logits within 1e-3 of their range; and the steering must have moved them by far more."""
    steerings = [steering for steering, _ in actions]
    dials = {steering.name: dial for steering, dial in actions}
    with_hook = SteeredLlama(model.gguf_path, steering=steerings, angles=dials, n_ctx=128, **EXACT | llama)
    found = with_hook.logits([*TOKENS, 0], 1)
    expected = tiny.torch_logits(model.hf_dir, TOKENS, actions)
    unsteered = tiny.torch_logits(model.hf_dir, TOKENS)
    reach = float(np.ptp(expected))
    assert np.abs(found - expected).max() <= 1e-3 * reach
    assert np.abs(unsteered - expected).max() > 2e-2 * reach


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_hook_and_torch_give_the_same_logits(
    models: dict[str, tiny.TinyModel], family: str, operator: Operator
) -> None:
    model = models[family]
    assert_same_logits(model, [(steering_for(model, operator), DIAL[operator])])


@pytest.mark.parametrize("operator", ["selective", "ablation"])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_the_lora_engine_gives_the_hook_s_logits(
    models: dict[str, tiny.TinyModel], family: str, operator: Operator
) -> None:
    model = models[family]
    for angle in (-12.0, 180.0) if operator == "selective" else (1.0,):
        assert_same_logits(model, [(steering_for(model, operator), angle)], engine="lora")


def test_the_lora_engine_is_silent_on_repacked_weights(
    models: dict[str, tiny.TinyModel], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp repacks Q4_0 where the processor gains by it."""
    quantize_file(models["llama"].gguf_path, tmp_path / "q4_0.gguf", "Q4_0", threads=1)
    steering = steering_for(models["llama"], "selective")
    llm = SteeredLlama(tmp_path / "q4_0.gguf", steering=steering, angle=20, engine="lora", **EXACT)
    llm.eval(TOKENS[:4])
    assert llm.sites_hit == 6
    llm.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_norms_behind_a_half_block_are_steered_too(models: dict[str, tiny.TinyModel], family: str) -> None:
    """Gemma-2's `ffn_post_norm` bears no number in llama.cpp's graph."""
    model = models[family]
    assert_same_logits(model, [(steering_for(model, "selective", "attn_post_norm,ffn_post_norm"), 40.0)])


def test_three_steerings_in_order_are_the_same_in_both(models: dict[str, tiny.TinyModel]) -> None:
    model = models["llama"]
    names: list[Operator] = ["standard", "selective", "addition"]
    actions = [(steering_for(model, op, seed=i, name=f"s{i}"), DIAL[op]) for i, op in enumerate(names)]
    assert_same_logits(model, [(s, d) for s, d in actions])


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_copying_path_gives_the_host_path_s_logits(
    models: dict[str, tiny.TinyModel], operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["gemma3"]
    steering = steering_for(model, operator)
    found = {}
    for path in ("host", "copy"):
        monkeypatch.setenv("EDGE_STEER_HOOK", path)
        llm = SteeredLlama(model.gguf_path, steering=steering, angle=DIAL[operator], n_ctx=128, **EXACT)
        found[path] = llm.logits([*TOKENS, 0], 1)
    assert (found["host"] == found["copy"]).all()


def test_addition_at_the_residual_stream_is_the_same_in_both(models: dict[str, tiny.TinyModel]) -> None:
    model = models["llama"]
    assert_same_logits(model, [(steering_for(model, "addition", "layer_out"), 0.5)])
