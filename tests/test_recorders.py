"""Two recorders, one result: a GGUF through llama.cpp's hook, and the same weights through transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402

from edge_steer.calibration import calibrate  # noqa: E402
from edge_steer.calibration.native_recorder import NativeRecorder  # noqa: E402
from edge_steer.calibration.torch_recorder import TorchRecorder  # noqa: E402
from edge_steer.prompts import Prompt, PromptSet  # noqa: E402
from edge_steer.runtime.hook import Record  # noqa: E402

THINGS = ("tea", "the sun in the morning", "rain", "an old book")
PROMPTS = PromptSet(
    "mood",
    "",
    "happy",
    "sad",
    tuple(Prompt(f"I love {thing}", system="Feel.") for thing in THINGS),
    tuple(Prompt(f"I hate {thing}", prefix="So") for thing in THINGS),
    (),
)


def silent(_: int) -> None:
    """No progress."""


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_both_recorders_make_the_same_steering(family: str, tmp_path: Path) -> None:
    model = tiny.build(family, tmp_path)
    f32 = llama_cpp.GGML_TYPE_F32
    native = NativeRecorder(model.gguf_path, n_ctx=256, n_threads=2, type_k=f32, type_v=f32, verbose=False)
    torch = TorchRecorder.load(model.hf_dir, device="cpu")
    assert native.sites == torch.sites
    # Gemma's GELU is a table of half-precision numbers in ggml's CPU backend.
    bound = 5e-4 if family.startswith("gemma") else 5e-6
    a, b = native.sums(PROMPTS.positive, silent), torch.sums(PROMPTS.positive, silent)
    for name in ("h", "unit", "norm", "sink"):
        expected = getattr(b, name)
        assert np.abs(getattr(a, name) - expected).max() <= bound * np.abs(expected).max(), name
    x, y = (calibrate(recorder, PROMPTS, mask="all") for recorder in (native, torch))
    assert x.sites == y.sites
    np.testing.assert_allclose(x.basis, y.basis, atol=bound)
    np.testing.assert_allclose(x.mean_norm, y.mean_norm, rtol=bound)
    along = np.abs(y.mean_norm).max()  # what a mean along b1 is a part of
    np.testing.assert_allclose(x.class_means, y.class_means, atol=10 * bound * along)
    np.testing.assert_allclose(x.separation, y.separation, rtol=100 * bound)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_attention_sink_is_the_first_token_s_activation_in_the_stream(family: str, tmp_path: Path) -> None:
    model = tiny.build(family, tmp_path)
    f32 = llama_cpp.GGML_TYPE_F32
    native = NativeRecorder(
        model.gguf_path, sites="layer_out", n_ctx=256, n_threads=1, type_k=f32, type_v=f32, verbose=False
    )
    torch = TorchRecorder.load(model.hf_dir, sites="layer_out", device="cpu")
    first = native.model.text_tokens(native.model.chat_template.prompt_text(PROMPTS.positive[0]))[:1]
    record = Record.zeros(len(native.model.hook_sites), native.base.embedding_length)
    native.model.observe(first, record)
    expected = np.stack([record.sum[native.model.hook_sites.index(site)] for site in native.sites])
    unit = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    for recorder in (native, torch):
        found = recorder.sums(PROMPTS.positive, silent).sink
        assert np.abs(found - expected).max() <= 5e-4 * np.abs(expected).max()
        made = calibrate(recorder, PROMPTS, kinds=("layer_out",))
        for site in made.sites:
            assert np.abs(made.basis_at(site) @ unit[recorder.sites.index(site)]).max() < 1e-3
