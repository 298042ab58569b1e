"""The torch recorder against plain forward passes of tiny models, one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny  # noqa: E402

from edge_steer.architectures import MODEL_TYPES, architecture  # noqa: E402
from edge_steer.calibration import ClassSums, calibrate  # noqa: E402
from edge_steer.calibration.torch_recorder import TorchRecorder  # noqa: E402
from edge_steer.errors import SteerError  # noqa: E402
from edge_steer.prompts import Prompt, PromptSet  # noqa: E402
from edge_steer.sites import PRE_KINDS  # noqa: E402

WORDS = ["sun", "a quiet garden path", "no", "rain over the hills since the morning", "tea", "the end of a long story"]
PROMPTS = [Prompt(word) for word in WORDS] + [Prompt("how?", system="Be brief."), Prompt("and?", prefix="Well, ")]


@pytest.fixture(scope="module", params=["llama", "gemma2", "gemma3", "qwen2_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyModel:
    return tiny.build(request.param, tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def llama(tmp_path: Path) -> tiny.TinyModel:
    return tiny.build("llama", tmp_path)


def one_by_one(model: tiny.TinyModel, recorder: TorchRecorder) -> np.ndarray:
    """Activations (n, S, d) of each prompt's last token, from passes without padding and with hooks of their own."""
    body = transformers.AutoModelForCausalLM.from_pretrained(model.hf_dir, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.hf_dir)
    known = architecture(MODEL_TYPES[body.config.model_type])
    seen: dict[str, Any] = {}
    for site in recorder.sites:
        body.get_submodule(known.module(site)).register_forward_hook(
            lambda _module, _inputs, output, name=site.name: seen.__setitem__(name, output)
        )
    rows = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(prompt.messages(), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + (prompt.prefix or ""), add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        with torch.inference_mode():
            body(torch.tensor([ids]))
        rows.append([seen[site.name][0, -1].numpy() for site in recorder.sites])
    return np.array(rows)


def silent(_: int) -> None:
    """No progress."""


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 2e-6 * np.abs(b).max())


@pytest.mark.parametrize("sites", ["all", "layer_out"])
def test_batches_record_what_single_passes_record(model: tiny.TinyModel, sites: str) -> None:
    recorder = TorchRecorder.load(model.hf_dir, sites=sites, device="cpu", batch_size=3)
    expected = one_by_one(model, recorder)
    steps: list[int] = []
    sums, whole = recorder.sums(PROMPTS, steps.append), ClassSums.of(expected)
    assert steps == [3, 3, 2]
    assert sums.count == len(PROMPTS)
    for name in ("h", "unit", "norm"):
        assert close(getattr(sums, name), getattr(whole, name)), name
    kept = sorted(sums.rows, key=lambda row: row.sum())
    assert all(close(row, wanted) for row, wanted in zip(kept, sorted(expected, key=np.sum), strict=True))


def test_left_padding_changes_nothing(model: tiny.TinyModel) -> None:
    recorder = TorchRecorder.load(model.hf_dir, device="cpu")
    alone = recorder.sums(PROMPTS[:1], silent).rows[0]
    _, beside_a_long_one = recorder.sums([PROMPTS[0], Prompt("long " * 20)], silent).rows
    assert close(beside_a_long_one, alone)


def test_no_hook_stays_behind_not_even_after_an_error(llama: tiny.TinyModel) -> None:
    recorder = TorchRecorder.load(llama.hf_dir, device="cpu")

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in recorder.model.modules())

    before = hooks()
    recorder.sums(PROMPTS, silent)
    recorder.model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recorder.sums(PROMPTS, silent)
    assert hooks() == before


def test_the_first_norm_sees_one_activation_and_is_left_out(llama: tiny.TinyModel) -> None:
    prompts = PromptSet("test", "", "a", "b", tuple(PROMPTS[:3]), tuple(PROMPTS[3:6]), ())
    notes: list[str] = []
    recorder = TorchRecorder.load(llama.hf_dir, device="cpu")
    steering = calibrate(recorder, prompts, kinds=PRE_KINDS, note=notes.append)
    assert recorder.sites[0] not in steering.sites
    assert len(steering.sites) == 2 * tiny.LAYERS - 1
    assert notes == ["blk.0.attn_norm is left out: both classes have the same mean activation there"]
    assert steering.base.architecture == "llama"
    assert (steering.made.recorder, steering.made.model) == ("torch", "llama")


def test_what_cannot_be_loaded_is_one_clear_line(
    llama: tiny.TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(path: Any, **options: Any) -> str:
        with pytest.raises(SteerError) as caught:
            TorchRecorder.load(path, **options)
        text = str(caught.value)
        assert "\n" not in text
        return text

    assert "which is none" in line(tmp_path / "nowhere")
    assert "which is none" in line("./nowhere")
    (tmp_path / "empty").mkdir()
    assert "without config.json" in line(tmp_path / "empty")
    assert "batch size" in line(llama.hf_dir, batch_size=0)
    assert "device among" in line(llama.hf_dir, device="tpu")
    assert "dtype among" in line(llama.hf_dir, dtype="int8")
    assert "sites among" in line(llama.hf_dir, sites="attn_post_norm")
    if not torch.cuda.is_available():
        assert "use --device cpu" in line(llama.hf_dir, device="cuda")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "got 'gpt2'" in line(tmp_path / "other")

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("cannot connect\nsecond line")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert line("someone/some-model").endswith("got someone/some-model: cannot connect")
