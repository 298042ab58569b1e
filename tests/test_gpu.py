"""Layers on a GPU: the hook turns there what it turns on the CPU, whatever GPU llama.cpp finds.

Needs a llama-cpp-python with a GPU backend, or GGML_BACKEND_PATH, a backend to load; `just try-vulkan` compiles one for
Mesa's software Vulkan, which any machine has. What the GPU's own arithmetic changes is measured without steering.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from devices import CPU_ONLY, EXACT, TOLERANCE, gpus, logits_by_batch, open_forced, path_forced, steerings_for
from planted import DIAL, random_steering

from edge_steer import SteerError
from edge_steer.choices import OPERATORS, Operator
from edge_steer.cli.main import main
from edge_steer.model_file import read_model
from edge_steer.preset import neutral_passages
from edge_steer.runtime.hook import Record
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.together import SEQUENCES
from edge_steer.sharing.shipped import shipped_file
from edge_steer.sites import Site
from edge_steer.steering import Steering

pytestmark = pytest.mark.skipif(
    not gpus(), reason="llama.cpp finds no GPU: turning on a GPU is NOT tested; see docs/devices.md, or just try-vulkan"
)

ON_GPU: dict[str, Any] = {"n_gpu_layers": -1}
PROMPT = [256, *(30 + i % 200 for i in range(600))]


@pytest.fixture(scope="module")
def own_difference(model: Path) -> list[float]:
    """By batch, how far the unsteered GPU's logits are from the CPU's."""
    cpu, gpu = (SteeredLlama(model, steering=(), n_ctx=768, **EXACT, **where) for where in (CPU_ONLY, ON_GPU))
    pairs = zip(logits_by_batch(cpu), logits_by_batch(gpu), strict=True)
    own = [(float(np.abs(found - expected).max()), float(np.ptp(expected))) for expected, found in pairs]
    print("unsteered, GPU and CPU differ by", *(f"{each / reach:.1e}" for each, reach in own), "of the logits' range")
    return [each for each, _ in own]


def close(found: Sequence[SteeredLlama], expected: SteeredLlama, own: Sequence[float]) -> None:
    """Every way gives the logits of `expected`, on the same GPU. own: how far its rounding may move them, by batch:
    where a last bit differs, half precision rounds a factor of the next product to the other side."""
    for allowed, wanted, *each in zip(own, *map(logits_by_batch, (expected, *found)), strict=True):
        assert np.isfinite(wanted).all()
        for logits in each:
            print(f"two ways differ by {np.abs(logits - wanted).max() / np.ptp(wanted):.1e} of the logits' range")
            assert np.abs(logits - wanted).max() <= TOLERANCE * np.ptp(wanted) + allowed


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_gpu_turns_what_the_host_turns(
    model: Path, own_difference: list[float], operator: Operator, count: int
) -> None:
    steerings = steerings_for(model, operator, count)
    cpu = open_forced(model, "host", steerings, **CPU_ONLY)
    copied, *others = (open_forced(model, way, steerings, **ON_GPU) for way in ("copy", "device", "auto"))
    close(others, copied, own_difference)
    for own, expected, found in zip(own_difference, *map(logits_by_batch, (cpu, others[0])), strict=True):
        assert np.abs(found - expected).max() <= 4 * own + TOLERANCE * np.ptp(expected)
    assert [((each._hook.turned > 0) == (cpu._hook.turned > 0)).all() for each in (copied, *others)] == [
        True,
        True,
        True,
    ]


def test_the_host_path_cannot_reach_the_gpu(model: Path) -> None:
    """So the tests above are about memory that is not the host's."""
    llm = open_forced(model, "host", steerings_for(model, "selective", 1), **ON_GPU)
    with pytest.raises(SteerError, match="memory it cannot reach"):
        llm.eval([256, 40])


def far_out(model: Path, length: float) -> list[Steering]:
    """Activations as long as some models' residual streams, made by an addition, then turned."""
    base = read_model(model).base
    sites = [Site(layer, "layer_out") for layer in range(tiny.LAYERS // 2, tiny.LAYERS - 1)]
    return [
        random_steering(base, sites, "addition", seed=1, name="long", mean_norm=length / DIAL["addition"]),
        *(random_steering(base, sites, each, seed=2, name=each) for each in ("selective", "adaptive", "ablation")),
    ]


@pytest.mark.parametrize("length", [1e3, 1e6])
def test_long_activations_are_turned_in_full_precision(model: Path, own_difference: list[float], length: float) -> None:
    """A GPU may multiply F32 matrices in half precision, which ends at 65504 and has 11 bits."""
    steerings = far_out(model, length)
    copied, device = (open_forced(model, way, steerings, **ON_GPU) for way in ("copy", "device"))
    close([device], copied, own_difference)


def test_a_new_dial_reaches_the_gpu(model: Path, own_difference: list[float]) -> None:
    (steering,) = steerings_for(model, "adaptive", 1)
    copied, device = (open_forced(model, way, [steering], **ON_GPU) for way in ("copy", "device"))
    seen = []
    for angle in (10, 200, None, -40, 10):
        for llm in (copied, device):
            llm.angle = angle
        expected, found = (llm.logits([256, *range(40, 60), 0], 1) for llm in (copied, device))
        assert np.abs(found - expected).max() <= TOLERANCE * np.ptp(expected) + max(own_difference)
        seen.append(found)
    assert (seen[0] == seen[4]).all()
    assert np.abs(seen[0] - seen[1]).max() > 1e-2 * np.ptp(seen[0])


def test_a_steering_that_is_off_does_nothing_on_the_gpu(model: Path, own_difference: list[float]) -> None:
    steerings = steerings_for(model, "standard", 3)
    found = [open_forced(model, way, steerings, **ON_GPU) for way in ("copy", "device")]
    for llm in found:
        llm.angles[steerings[0].name] = None
        llm.angles[steerings[2].name] = None
    close(found[1:], found[0], own_difference)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_that_is_half_on_the_gpu_is_turned_whole(model: Path, own_difference: list[float], layers: int) -> None:
    steerings = steerings_for(model, "selective", 3)
    copied, auto = (open_forced(model, way, steerings, n_gpu_layers=layers) for way in ("copy", "auto"))
    close([auto], copied, own_difference)
    assert (copied._hook.turned == auto._hook.turned).all()
    assert (auto._hook.turned > 0).any()


def test_recording_on_the_gpu_gives_the_cpu_s_sums(model: Path) -> None:
    records = []
    for where in (CPU_ONLY, ON_GPU):
        llm = SteeredLlama(model, steering=(), n_ctx=768, **EXACT, **where)
        record = Record.zeros(len(llm.hook_sites), tiny.WIDTH)
        for prompt in ([256, 40], PROMPT):
            llm.observe(prompt, record)
        records.append(record)
    assert (records[0].count == records[1].count).all()
    assert (records[0].count == 2).all()
    assert np.abs(records[0].sum - records[1].sum).max() <= 2e-3 * np.abs(records[0].sum).max()


def test_prompts_recorded_together_on_the_gpu_are_the_cpu_s(model: Path) -> None:
    prompts = [[256, *range(30, 40 + count)] for count in range(20)]
    found = []
    for where in (CPU_ONLY, ON_GPU):
        llm = SteeredLlama(model, steering=(), n_ctx=768, sequences=SEQUENCES, **EXACT, **where)
        records = list(llm.observe_each(prompts))
        assert len(records) < len(prompts)
        found.append(np.concatenate([each.rows for each in records], axis=1))
    assert found[0].shape == found[1].shape == (len(llm.hook_sites), len(prompts), tiny.WIDTH)
    assert np.abs(found[0] - found[1]).max() <= 1e-2 * np.abs(found[0]).max()


def test_recording_and_turning_at_once_records_what_was_there_before(model: Path) -> None:
    steerings = steerings_for(model, "selective", 1)
    records = []
    for way in ("copy", "device"):
        llm = open_forced(model, way, steerings, **ON_GPU)
        record = Record.zeros(len(llm.hook_sites), tiny.WIDTH)
        llm._hook.record(record)
        llm.eval([256, 40, 50])
        llm._hook.record(None)
        assert llm.sites_hit == len(steerings[0].steered)
        records.append(record.rows)
    assert np.abs(records[1] - records[0]).max() <= TOLERANCE * np.abs(records[0]).max()


def test_the_lora_engine_is_chosen_and_works_on_the_gpu(model: Path) -> None:
    (steering,) = steerings_for(model, "selective", 1)
    dials = {steering.name: DIAL["selective"]}
    lora = SteeredLlama(model, steering=steering, angles=dials, n_ctx=768, **EXACT, **ON_GPU)
    assert lora.engine == "lora"
    hook = open_forced(model, "device", [steering], **ON_GPU)
    for expected, found in zip(logits_by_batch(hook), logits_by_batch(lora), strict=True):
        assert np.abs(found - expected).max() <= 5e-3 * np.ptp(expected)


def test_generate_answers_the_same_on_the_gpu(model: Path, tmp_path: Path) -> None:
    (steering,) = steerings_for(model, "selective", 1)
    path = tmp_path / "s.gguf"
    steering.with_(angle=DIAL["selective"]).save(path)
    arguments = ["generate", "-m", str(model), "-s", str(path), "--engine", "hook", "-p", "Hello"]
    arguments += ["--max-tokens", "12", "--ctx", "256", "--threads", "1"]
    with path_forced("auto"):
        answers = [CliRunner().invoke(main, [*arguments, "--gpu-layers", layers]) for layers in ("0", "-1")]
    assert [each.exit_code for each in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout
    assert answers[0].stdout.strip()


@pytest.mark.slow
def test_a_real_model_is_steered_on_the_gpu_as_on_the_cpu(smollm2: Path) -> None:
    """A dial changes the GPU's logits as it changes the CPU's, but for what the GPU changes without steering."""
    steering = Steering.load(shipped_file("sentiment", smollm2))
    cpu, device, copied = (
        open_forced(smollm2, way, [steering], **where)
        for way, where in (("host", CPU_ONLY), ("device", ON_GPU), ("copy", ON_GPU))
    )
    tokens = cpu.tokenize("\n".join(neutral_passages()).encode(), add_bos=True, special=False)[:48]
    plain: list[NDArray[np.float32]] = []
    for angle in (None, steering.angle_min, steering.angle_max):
        found = []
        for llm in (cpu, device, copied):
            llm.angle = angle
            found.append(llm.logits([*tokens, 0], 1))
        plain = plain or found
        own, now, ways = (
            np.abs(one - other).mean() for one, other in ((plain[1], plain[0]), (found[1], found[0]), found[1:])
        )
        effect = np.abs(found[0] - plain[0]).mean()
        print(f"{angle}: the GPU's logits differ from the CPU's by {now:.4f} of {effect:.4f}, unsteered by {own:.4f}")
        assert now <= 2 * own
        assert ways <= own
        assert angle is None or effect > 2 * now
