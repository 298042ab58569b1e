"""`verify`: engines that agree pass, one that does not is found, and the tolerances are those of the weight type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ONE_THREAD, ran, run
from planted import DIAL, random_steering

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
import torch
import transformers
from exports import TOKENS, steering_for, tinies

from edge_steer.architectures import architecture
from edge_steer.choices import OPERATORS, Operator
from edge_steer.errors import MismatchError, NoEffectError, SteerError
from edge_steer.model_file import read_model
from edge_steer.runtime.torch_hooks import steer
from edge_steer.verify import engine_runs
from edge_steer.verify.comparison import TOLERANCES, Distance, measure_distance
from edge_steer.verify.verification import Verification, verify

__all__ = ["tinies"]

FAST: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "tokens": 48}


def as_q8(model: Path, folder: Path) -> Path:
    from edge_steer.converters.quantize import quantize_file

    quantize_file(model, folder / "small.gguf", "Q8_0")
    return folder / "small.gguf"


def pairs(found: Verification) -> list[tuple[str, str]]:
    return [(each.one, each.other) for each in found.comparisons]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("angle", [-12.0, 90.0])
def test_all_engines_agree_on_every_family(tinies: dict[str, Any], family: str, angle: float) -> None:
    model = tinies[family]
    found = verify(model.gguf_path, [(steering_for(model.gguf_path), angle)], hf=model.hf_dir, **FAST)
    assert found.passed, found.comparisons
    assert pairs(found) == [
        ("hook", "lora"), ("hook", "baked"), ("hook", "torch"), ("lora", "baked"), ("lora", "torch"), ("baked", "torch")
    ]  # fmt: skip
    assert (found.weights, found.tokens, found.rounding, found.notes) == ("F32", 48, {"F32": 0.0}, ())
    assert found.effects["hook"].changed.kl > 100 * max(each.steered.kl for each in found.comparisons)
    assert all(abs(effect.kept - 1) < 1e-3 for effect in found.effects.values())


def test_several_steerings_and_ablations_are_compared_too(tinies: dict[str, Any]) -> None:
    model = tinies["llama"]
    operators: list[Operator] = ["selective", "ablation", "selective"]
    on = [
        (steering_for(model.gguf_path, operator, seed=seed, name=f"s{seed}"), DIAL[operator])
        for seed, operator in enumerate(operators)
    ]
    found = verify(model.gguf_path, [*on, (steering_for(model.gguf_path, "standard"), None)], hf=model.hf_dir, **FAST)
    assert found.passed
    assert len(found.comparisons) == 6


@pytest.mark.parametrize("operator", ["selective", "ablation"])
def test_quantized_weights_are_judged_by_what_rounding_costs_unsteered(
    tinies: dict[str, Any], operator: Operator, tmp_path: Path
) -> None:
    model = tinies["llama"]
    small = as_q8(model.gguf_path, tmp_path)
    steering = steering_for(small, operator)
    found = verify(small, [(steering, DIAL[operator])], hf=model.hf_dir, **FAST)
    assert found.passed, found.comparisons
    assert list(found.effects) == ["hook", "lora", "baked", "baked F32", "torch"]
    assert found.weights == "Q8_0"
    assert found.rounding["Q8_0"] > 1e-4
    floor = TOLERANCES["quantized"]
    for each in found.comparisons:
        if each.unsteered is not None:
            assert each.limit.kl == max(floor.kl, 2 * each.unsteered.kl)
        else:
            assert operator == "ablation"
            assert "baked" in (each.one, each.other)
            assert each.limit.kl == found.effects["hook"].changed.kl
    assert not list(tmp_path.glob("*baked*"))


@pytest.mark.parametrize("operator", ["standard", "adaptive", "addition"])
def test_operators_that_no_weight_can_do_are_compared_with_transformers_alone(
    tinies: dict[str, Any], operator: Operator
) -> None:
    model = tinies["qwen3"]
    on = [(steering_for(model.gguf_path, operator), DIAL[operator])]
    with pytest.raises(SteerError, match=r"nothing to compare the hook with: .*--hf DIR"):
        verify(model.gguf_path, on, **FAST)
    found = verify(model.gguf_path, on, hf=model.hf_dir, **FAST)
    assert found.passed
    assert pairs(found) == [("hook", "torch")]
    assert operator in found.notes[0]


def test_post_norm_sites_are_compared_with_transformers_alone(tinies: dict[str, Any]) -> None:
    model = tinies["gemma3"]
    steering = steering_for(model.gguf_path, sites="all")
    found = verify(model.gguf_path, [(steering, 20.0)], hf=model.hf_dir, **FAST)
    assert found.passed
    assert pairs(found) == [("hook", "torch")]
    assert "attn_post_norm" in found.notes[0]


def test_nothing_to_compare_is_an_error(tinies: dict[str, Any]) -> None:
    model = tinies["llama"]
    for dial in (None, 0.0):
        with pytest.raises(NoEffectError, match="off"):
            verify(model.gguf_path, [(steering_for(model.gguf_path), dial)], **FAST)
    with pytest.raises(MismatchError, match=r"layers|width|architecture"):
        verify(model.gguf_path, [(steering_for(tinies["gemma3"].gguf_path), 8.0)], **FAST)


def test_the_directory_of_another_model_is_refused(tinies: dict[str, Any], tmp_path: Path) -> None:
    model = tinies["llama"]
    on = [(steering_for(model.gguf_path), 8.0)]
    with pytest.raises(MismatchError, match="architecture is llama, the model's is qwen2"):
        verify(model.gguf_path, on, hf=tinies["qwen2"].hf_dir, **FAST)
    with pytest.raises(MismatchError, match="give another directory"):
        verify(model.gguf_path, on, hf=tiny.build("llama", tmp_path, seed=1).hf_dir, **FAST)


# --- an engine that is wrong ----------------------------------------------------------------------------------------


def twice(steerings: Any) -> Any:
    return [(steering, 2 * dial) for steering, dial in steerings]


def wrong_bake(monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine_runs.bake_gguf
    monkeypatch.setattr(engine_runs, "bake_gguf", lambda model, out, on, **rest: right(model, out, twice(on), **rest))


def wrong_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def double(model: Any, on: Any) -> Iterator[None]:
        with steer(model, twice(on)):
            yield

    monkeypatch.setattr(engine_runs, "steer", double)


def wrong_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_steer.export import lora

    right = lora.live_adapter
    monkeypatch.setattr(
        lora,
        "live_adapter",
        lambda llm, source, actions: right(llm, source, [type(a)(2 * a.degrees) for a in actions]),
    )


@pytest.mark.parametrize(("engine", "wrong"), [("baked", wrong_bake), ("lora", wrong_adapter), ("torch", wrong_hooks)])
def test_an_engine_that_turns_too_far_is_found(
    tinies: dict[str, Any], engine: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tinies["llama"]
    steering_for(model.gguf_path).save(tmp_path / "s.gguf")
    wrong(monkeypatch)
    found = run(
        "verify", "-m", model.gguf_path, "-s", f"{tmp_path / 's.gguf'}:6", "--hf", model.hf_dir, "--tokens", 32,
        "--json", *ONE_THREAD,
    )  # fmt: skip
    assert found.exit_code == 1
    told = json.loads(found.stdout)
    assert not told["passed"]
    far = [{each["one"], each["other"]} for each in told["comparisons"] if not each["passed"]]
    assert far == [pair for each in told["comparisons"] if engine in (pair := {each["one"], each["other"]})]
    last = found.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert engine in last
    assert "and 2 more pairs" in last


def test_a_wrong_bake_of_quantized_weights_is_found(
    tinies: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = as_q8(tinies["llama"].gguf_path, tmp_path)
    wrong_bake(monkeypatch)
    found = verify(small, [(steering_for(small), 20.0)], **FAST)
    far = {(each.one, each.other) for each in found.comparisons if not each.passed}
    assert {("hook", "baked F32"), ("lora", "baked F32")} <= far
    assert found.effects["baked F32"].kept > 1.3


# --- the verb -------------------------------------------------------------------------------------------------------


def test_the_verb_prints_a_table_and_json_and_exits_0(tinies: dict[str, Any], tmp_path: Path) -> None:
    model = tinies["llama"].gguf_path
    steering_for(model).save(tmp_path / "s.gguf")
    common = ["verify", "-m", model, "-s", tmp_path / "s.gguf", "--angle", 8, "--tokens", 32, *ONE_THREAD]
    table = ran(*common).stdout
    assert table.splitlines()[0] == f"random at 8; {model} (F32); 32 tokens"
    for words in ("hook, lora", "hook, baked", "lora, baked", "what it changes", "ok"):
        assert words in table
    told = ran(*common, "--json")
    assert told.stderr == ""
    record = json.loads(told.stdout)
    assert record["passed"]
    assert record["angles"] == {"random": 8.0}
    assert set(record) == {
        "model", "angles", "weights", "tokens", "effects", "comparisons", "rounding", "notes", "passed"
    }  # fmt: skip
    assert set(record["effects"]["hook"]) == {"changed", "kept"}
    assert set(record["comparisons"][0]) == {"one", "other", "steered", "unsteered", "limit", "passed"}
    assert set(record["comparisons"][0]["steered"]) == {"logits", "kl", "top1"}
    assert record["comparisons"][0]["limit"] == {"kl": 1e-5, "logits": 2e-2}


def test_the_verb_says_what_is_missing(tinies: dict[str, Any], tmp_path: Path) -> None:
    model = tinies["llama"].gguf_path
    steering_for(model).save(tmp_path / "s.gguf")
    steering_for(model, "standard").save(tmp_path / "standard.gguf")
    for arguments, message in (
        (["-s", tmp_path / "s.gguf"], "no default angle"),
        ([], "steering"),
        (["-s", f"{tmp_path / 's.gguf'}:0"], "off"),
        (["-s", f"{tmp_path / 'standard.gguf'}:40"], "--hf DIR"),
        (["-s", f"{tmp_path / 's.gguf'}:8", "--hf", tmp_path], "config.json"),
    ):
        found = run("verify", "-m", model, *arguments, "--tokens", 16, *ONE_THREAD)
        assert found.exit_code == 1
        assert message in found.stderr
        assert found.stdout == ""


# --- what it is made of ---------------------------------------------------------------------------------------------


def test_distance_is_what_its_names_say() -> None:
    a = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    b = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32)) + 3
    found = measure_distance(a, b)
    assert found.logits == pytest.approx(np.abs(a - b).max())
    assert found.kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)
    assert found.top1 == 0.5
    assert measure_distance(a, np.pad(a, ((0, 0), (0, 5)))) == Distance(0.0, 0.0, 1.0)


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_hooks_are_the_reference_s_logits_and_leave_nothing_behind(
    tinies: dict[str, Any], operator: Operator
) -> None:
    made = tinies["qwen2"]
    model = transformers.AutoModelForCausalLM.from_pretrained(made.hf_dir, dtype=torch.float32).eval()
    file = read_model(made.gguf_path)
    sites = architecture("qwen2").sites(file.block_count, "attn_norm,ffn_norm,layer_out")
    on = [(random_steering(file.base, sites, operator), DIAL[operator])]

    def logits() -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model(torch.tensor([TOKENS])).logits[0])

    before = logits()
    with steer(model, [*on, (steering_for(made.gguf_path, name="off"), None)]):
        np.testing.assert_array_equal(logits(), tiny.torch_logits(made.hf_dir, TOKENS, on))
    assert (logits() == before).all()
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(MismatchError), steer(model, [(steering_for(tinies["gemma3"].gguf_path), 8.0)]):
        pass
