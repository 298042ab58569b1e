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
    for name in ("h", "unit", "norm"):
        expected = getattr(b, name)
        assert np.abs(getattr(a, name) - expected).max() <= bound * np.abs(expected).max(), name
    x, y = (calibrate(recorder, PROMPTS, mask="all") for recorder in (native, torch))
    assert x.sites == y.sites
    np.testing.assert_allclose(x.basis, y.basis, atol=bound)
    np.testing.assert_allclose(x.mean_norm, y.mean_norm, rtol=bound)
    np.testing.assert_allclose(x.separation, y.separation, rtol=100 * bound)
