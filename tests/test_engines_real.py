"""Every form of one steering on a real model gives the same logits: hook, adapters, baked weights, transformers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from directories import convert, directory_of
from exports import ANGLES, Logits, hook_logits, kl, plain_logits

from edge_steer.calibration import calibrate
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.converters.quantize import quantize_file
from edge_steer.export.baked import bake_gguf
from edge_steer.export.hf import bake_hf
from edge_steer.export.lora import export_adapter, export_pair
from edge_steer.export.peft import export_peft
from edge_steer.preset import load_preset, neutral_passages
from edge_steer.rotation import cos_sin
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering
from edge_steer.verify.verification import Verification, verify

pytestmark = pytest.mark.slow

THREAD: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1}


@dataclass(frozen=True)
class Real:
    """SmolLM2 as a Hugging Face directory and as F32 GGUF, a steering calibrated on it, and a text."""

    hf: Path
    gguf: Path
    steering: Steering
    tokens: list[int]


@pytest.fixture(scope="module")
def real(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    hf, gguf = directory_of(smollm2, folder / "smollm2", "float32"), folder / "f32.gguf"
    with pytest.warns(UserWarning, match="does not split text as smollm"):
        convert(hf, gguf, type="f32", pre="smollm")
    prompts = load_preset("sentiment").first(24)
    steering = calibrate(NativeRecorder(gguf, n_ctx=256, **THREAD), prompts, name="happy")
    llm = SteeredLlama(gguf, n_ctx=256, steering=())
    tokens = llm.tokenize("\n".join(neutral_passages()).encode(), add_bos=True, special=False)[:64]
    llm.close()
    return Real(hf, gguf, steering, tokens)


def torch_logits(model: torch.nn.Module, tokens: list[int]) -> Logits:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("angle", ANGLES)
def test_as_f32_all_forms_agree_pairwise(real: Real, angle: float, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    on, text = [(real.steering, angle)], real.tokens
    cos, sin, _ = export_pair(real.gguf, tmp_path / "pair", real.steering)
    one, _ = export_adapter(real.gguf, tmp_path / "one", on)
    baked = bake_gguf(real.gguf, tmp_path / "baked.gguf", on).path
    turned = bake_hf(real.hf, tmp_path / "hf", on).path
    adapter = export_peft(real.hf, tmp_path / "peft", on)
    load = transformers.AutoModelForCausalLM.from_pretrained
    c, s = cos_sin(angle)
    found = {
        "hook": hook_logits(real.gguf, on, text),
        "pair": plain_logits(real.gguf, [(cos, c - 1), (sin, s)], tokens=text),
        "adapter": plain_logits(real.gguf, [(one, 1.0)], tokens=text),
        "baked GGUF": plain_logits(baked, tokens=text),
        "PEFT": torch_logits(peft.PeftModel.from_pretrained(load(real.hf, dtype="float32"), adapter), text),
        "baked directory": torch_logits(load(turned, dtype="float32"), text),
    }
    unsteered = plain_logits(real.gguf, tokens=text)
    worst_kl = worst_logit = 0.0
    for one_name, other in combinations(found, 2):
        p, q = found[one_name], found[other]
        worst_kl, worst_logit = max(worst_kl, kl(p, q)), max(worst_logit, float(abs(p - q).max()))
        assert kl(p, q) <= 1e-5, (one_name, other)
        assert abs(p - q).max() <= 2e-2, (one_name, other)
    changed = kl(unsteered, found["hook"])
    print(
        f"{angle:+g}°: largest KL {worst_kl:.1e}, largest difference {worst_logit:.1e}; steered changes {changed:.2f}"
    )
    assert changed > 1000 * worst_kl


def verified(real: Real, weights: str, angle: float, folder: Path) -> Verification:
    model = folder / "quantized.gguf"
    quantize_file(real.gguf, model, weights)
    found = verify(model, [(real.steering, angle)], hf=real.hf, tokens=64, **THREAD)
    for each in found.comparisons:
        beside = "–" if each.unsteered is None else f"{each.unsteered.kl:.1e}"
        print(f"{weights} {angle:+g}° {each.one}, {each.other}: KL {each.steered.kl:.1e}, unsteered {beside}")
    print(f"steering changes {found.effects['hook'].changed.kl:.2f}; rounding {found.rounding}")
    return found


@pytest.mark.parametrize("weights", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize("angle", [-12.0, 8.0])
def test_quantized_all_engines_agree_within_what_rounding_costs_unsteered(
    real: Real, weights: str, angle: float, tmp_path: Path
) -> None:
    found = verified(real, weights, angle, tmp_path)
    assert found.passed, found.comparisons
    for each in found.comparisons:
        if "baked" not in (each.one, each.other):
            assert each.steered.kl < 1e-2, (each.one, each.other)


@pytest.mark.parametrize("weights", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize("angle", [90.0, 180.0])
def test_quantized_and_far_out_engines_differ_by_less_than_a_tenth_of_what_the_steering_changes(
    real: Real, weights: str, angle: float, tmp_path: Path
) -> None:
    # The text has fallen apart here, and a model that is lost amplifies rounding far beyond its unsteered size.
    found = verified(real, weights, angle, tmp_path)
    changed = found.effects["hook"].changed.kl
    for each in found.comparisons:
        if "baked" not in (each.one, each.other):
            assert each.steered.kl < changed / 10, (each.one, each.other)
