"""Every kind of change in llama-cpp-python that edge-steer would stumble over is refused, and named."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import pytest
from llama_cpp import Llama, llama_chat_format
from llama_cpp._internals import LlamaBatch, LlamaContext
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from edge_steer import MismatchError, compatibility

check: Callable[[], None] = compatibility.check.__wrapped__


def refusal(monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of llama-cpp-python as it was changed."""
    monkeypatch.setattr(llama_cpp, "__version__", "0.3.99")
    with pytest.raises(MismatchError) as caught:
        check()
    said = str(caught.value)
    assert re.fullmatch(r"llama-cpp-python 0\.3\.99: expected .*, got .*; pip install llama-cpp-python==\S+", said)
    return said


def test_the_installed_release_passes() -> None:
    check()


def test_another_version_by_itself_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "__version__", "0.3.99")
    check()


@pytest.mark.parametrize(
    ("structure", "field"),
    [
        ("llama_context_params", "cb_eval"),
        ("llama_context_params", "cb_eval_user_data"),
        ("llama_model_params", "devices"),
        ("llama_model_quantize_params", "max_buf_size"),
    ],
)
def test_a_field_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, structure: str, field: str) -> None:
    fields = [each for each in getattr(llama_cpp, structure)._fields_ if each[0] != field]
    monkeypatch.setattr(llama_cpp, structure, SimpleNamespace(_fields_=fields))
    assert f"expected {structure} with the field {field}, got the fields " in refusal(monkeypatch)


def test_a_structure_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(llama_cpp, "llama_model_quantize_params")
    assert "expected llama_cpp.llama_model_quantize_params, got none" in refusal(monkeypatch)


@pytest.mark.parametrize("name", ["llama_vocab_is_eog", "llama_set_adapters_lora", "GGML_TYPE_F32"])
def test_a_function_of_llama_cpp_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(llama_cpp, name)
    assert f"expected llama_cpp.{name}, got none" in refusal(monkeypatch)


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (Llama, "_init_sampler"), (Llama, "save_state"), (LlamaBatch, "set_batch"), (LlamaContext, "kv_cache_seq_rm"),
        (llama_chat_format, "chat_formatter_to_chat_completion_handler"), (llama_chat_format, "Jinja2ChatFormatter"),
    ],
)  # fmt: skip
def test_a_method_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> None:
    monkeypatch.delattr(owner, method)
    assert re.search(rf"expected llama_cpp\.\w+\.(\w+\.)?{method}[\w.]*, got none", refusal(monkeypatch))


def renamed(self: Any, batch: Any, n_past: int, all_logits: bool) -> None: ...
def reordered(self: Any, n_past: int, batch: Any, logits_all: bool) -> None: ...
def with_one_more(self: Any, batch: Any, n_past: int, logits_all: bool, sequence: int) -> None: ...


@pytest.mark.parametrize("other", [renamed, reordered, with_one_more])
def test_a_method_that_takes_something_else_is_named(
    monkeypatch: pytest.MonkeyPatch, other: Callable[..., None]
) -> None:
    monkeypatch.setattr(LlamaBatch, "set_batch", other)
    found = ", ".join(other.__code__.co_varnames)
    said = refusal(monkeypatch)
    assert f"expected LlamaBatch.set_batch to take self, batch, n_past, logits_all, got {found};" in said


def test_an_option_that_llama_would_swallow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Any, model_path: str, n_ctx: int = 512, **kwargs: Any) -> None: ...

    monkeypatch.setattr(Llama, "__init__", init)
    assert "expected Llama.__init__ to take self, model_path, *, n_ctx, n_batch" in refusal(monkeypatch)


def test_an_optional_parameter_more_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_batch(self: Any, batch: Any, n_past: int, logits_all: bool, sequence: int = 0) -> None: ...

    monkeypatch.setattr(LlamaBatch, "set_batch", set_batch)
    check()


def test_a_method_that_works_in_another_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(self: Any, tokens: Any) -> None:  # as it was in 0.3.30
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        self._batch.set_batch(batch=tokens, n_past=self.n_tokens, logits_all=False)
        self._ctx.decode(self._batch)
        self.input_ids[self.n_tokens :] = tokens

    monkeypatch.setattr(Llama, "eval", evaluate)
    assert "expected Llama.eval to use _ctx, " in (said := refusal(monkeypatch))
    assert "got one without _requires_eval" in said


def test_a_formatter_that_renders_in_another_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Jinja2ChatFormatter, "__call__", lambda self, messages: self.template.render(messages))
    assert "expected Jinja2ChatFormatter.__call__ to use _environment, render" in refusal(monkeypatch)


def test_another_way_for_tokens_into_the_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def prefill(self: Any, tokens: Any) -> None:
        def decode(part: Any) -> None:
            self._batch.set_batch(part, 0, False)

        decode(tokens)

    monkeypatch.setattr(Llama, "prefill", prefill, raising=False)
    said = refusal(monkeypatch)
    assert "expected tokens to enter the cache by Llama.eval alone, got a batch in Llama.prefill too" in said


def test_a_model_without_an_attribute_is_refused() -> None:
    llm = SimpleNamespace(**{name: 0 for name in compatibility._ATTRIBUTES.split() if "." not in name})
    llm._ctx, llm._model = SimpleNamespace(ctx=0), SimpleNamespace(vocab=0)
    llm._batch = SimpleNamespace(batch=0, n_seq_max=1)
    compatibility.check_model(llm)
    del llm._model.vocab
    with pytest.raises(MismatchError, match=r"expected a Llama with _model\.vocab, got none; pip install"):
        compatibility.check_model(llm)
    del llm._requires_eval
    with pytest.raises(MismatchError, match=r"expected a Llama with _requires_eval, got none"):
        compatibility.check_model(llm)


def test_a_release_that_does_not_fit_is_one_line_of_the_program(tmp_path: Path) -> None:
    program = (
        "import llama_cpp.llama_chat_format as chats; del chats.Jinja2ChatFormatter\n"
        "from edge_steer.__main__ import run; run()"
    )
    pytest.importorskip("transformers")
    import tiny

    model = tiny.build("llama", tmp_path).gguf_path
    found = subprocess.run(
        [sys.executable, "-c", program, "generate", "-m", model, "-p", "Hello"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert re.match(r"Error: .*expected llama_cpp\.llama_chat_format\.Jinja2ChatFormatter", found.stderr)


def test_the_release_that_was_tested_is_in_the_range_that_is_declared() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'"llama-cpp-python>=([\d.]+),<([\d.]+)"', project)
    assert found is not None
    releases = (*found.groups(), compatibility.TESTED)
    lowest, above, tested = ([int(part) for part in each.split(".")] for each in releases)
    assert lowest <= tested < above
