"""What llama_cpp.Llama can do it does steered: in a context that was used at other angles as in a fresh one at its own.

Each feature is used unsteered and at another angle first, then at the angle in question twice, the second time on what
the first left in the cache; and in a fresh context whose hook stops at its sites.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import steering_for
from llama_cpp import LlamaDiskCache, LlamaGrammar, LlamaRAMCache, LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from devices import EXACT, path_forced

from edge_steer import SteerError
from edge_steer.export.lora import export_adapter
from edge_steer.fetch import resolve
from edge_steer.runtime.cache import Scope
from edge_steer.runtime.engines import EngineName
from edge_steer.runtime.llama import SteeredLlama

ANGLE, OTHER = 35.0, -50.0
PROMPT = "the rain in the anthem, the rain in the"
CHAT = [{"role": "system", "content": "Be."}, {"role": "user", "content": "the rain in the anthem"}]
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
SCHEMA = {"type": "object", "properties": {"the": {"type": "string", "maxLength": 6}, "n": {"enum": [1, 22, 333]}},
          "required": ["the", "n"]}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "rain", "description": "", "parameters": SCHEMA}}
Q8_0 = 8


@dataclass(frozen=True)
class Feature:
    """run: what is asked of the model. made: how the model is made."""

    run: Callable[[SteeredLlama], Any]
    made: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"


def completed(**how: Any) -> Callable[[SteeredLlama], Any]:
    return lambda llm: llm.create_completion(PROMPT, **GREEDY | how)["choices"][0]


def streamed(**how: Any) -> Callable[[SteeredLlama], Any]:
    return lambda llm: [part["choices"][0] for part in llm.create_completion(PROMPT, stream=True, **GREEDY | how)]


def chatted(**how: Any) -> Callable[[SteeredLlama], Any]:
    return lambda llm: llm.create_chat_completion(CHAT, **GREEDY | how)["choices"][0]


def constrained(llm: SteeredLlama) -> Any:
    grammar = LlamaGrammar.from_string('root ::= [a-z]+ " " [0-9]+ " " [A-Z]+', verbose=False)
    return completed(grammar=grammar)(llm)


def every_logit(llm: SteeredLlama) -> Any:
    llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0).__next__()
    return llm.scores[: llm.n_tokens].tolist()


def ends_at_a_space(tokens: Any, _: Any) -> bool:
    return len(tokens) > 45 or tokens[-1] == 32


def ascii_only(_: Any, logits: Any) -> Any:
    logits[94:] = -np.inf
    return logits


def without_even_tokens(_: Any, logits: Any) -> Any:
    logits[::2] = -np.inf
    return logits


# Greedily this family says one thing only. llama-cpp-python goes past max_tokens where bytes make no character.
DRAWN = completed(temperature=1.5, top_k=0, min_p=0.0, seed=5, logits_processor=LogitsProcessorList([ascii_only]))
DRAFT = {"draft_model": LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=6)}
QUANTIZED: dict[str, Any] = {
    "type_k": Q8_0,
    "type_v": Q8_0,
    "flash_attn": True,
}  # rows of 32: the family has heads as wide
FEATURES = {
    "completion": Feature(completed()),
    "chat completion": Feature(chatted()),
    "logprobs and echo": Feature(completed(logprobs=3, echo=True), {"logits_all": True}),
    "logprobs, streamed": Feature(streamed(logprobs=2), {"logits_all": True}),
    "logprobs of a chat": Feature(chatted(logprobs=True, top_logprobs=2), {"logits_all": True}),
    "logits_all": Feature(every_logit, {"logits_all": True}),
    "suffix": Feature(completed(suffix=" and so it ends")),
    "suffix first": Feature(completed(suffix=" and so it ends"), {"spm_infill": True}),
    "stop": Feature(completed(stop=["e", "!"], max_tokens=40)),
    "grammar": Feature(constrained),
    "json": Feature(chatted(response_format={"type": "json_object"}, max_tokens=30)),
    "json schema": Feature(chatted(response_format={"type": "json_object", "schema": SCHEMA}, max_tokens=40)),
    "tools": Feature(
        chatted(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "rain"}}, max_tokens=40)
    ),
    "mirostat 1": Feature(completed(mirostat_mode=1, temperature=0.9, seed=3, max_tokens=20)),
    "mirostat 2": Feature(completed(mirostat_mode=2, temperature=0.9, seed=3, max_tokens=20)),
    "typical, top-k and top-p": Feature(completed(temperature=0.9, typical_p=0.9, top_k=9, top_p=0.8, seed=5)),
    "penalties": Feature(completed(repeat_penalty=1.4, frequency_penalty=0.4, presence_penalty=0.3)),
    "logit_bias": Feature(completed(logit_bias={"70": 4.0, "71": -100.0, "72": 3.0})),
    "logits processor": Feature(completed(logits_processor=LogitsProcessorList([without_even_tokens]))),
    "stopping criteria": Feature(completed(stopping_criteria=StoppingCriteriaList([ends_at_a_space]), max_tokens=40)),
    "draft model": Feature(completed(max_tokens=30), DRAFT),
    "draft model, logprobs": Feature(completed(max_tokens=30, logprobs=1), DRAFT),
    "small batches": Feature(completed(), {"n_batch": 8, "n_ubatch": 8}),
    "small batches, logits_all": Feature(every_logit, {"n_batch": 8, "n_ubatch": 8, "logits_all": True}),
    "micro-batches": Feature(completed(), {"n_batch": 32, "n_ubatch": 8}),
    "two threads": Feature(completed(max_tokens=3), {"n_threads": 2, "n_threads_batch": 2}),
    "four threads": Feature(completed(max_tokens=3), {"n_threads": 4, "n_threads_batch": 4}),
    "flash attention": Feature(completed(), {"flash_attn": True}),
    "quantized cache": Feature(completed(), QUANTIZED, "qwen3"),
    "quantized cache, sliding window": Feature(DRAWN, QUANTIZED, "gemma3"),
    "half-precision cache": Feature(completed(), {"type_k": 1, "type_v": 1}),
    "narrow sliding window": Feature(DRAWN, {"swa_full": False, "n_batch": 8, "n_ubatch": 8}, "gemma3"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {family: tiny.build(family, folder).gguf_path for family in ("llama", "qwen3", "gemma3")}


def steered(path: Path, angle: float | None, engine: EngineName = "hook", **made: Any) -> SteeredLlama:
    how = {"n_ctx": 256, **EXACT, **made}
    return SteeredLlama(path, steering=steering_for(path), angle=angle, engine=engine, **how)


def assert_same(found: Any, expected: Any) -> None:
    """The same but for roundings: a prompt that is partly cached is evaluated in other batches."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            if key not in ("id", "created"):
                assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float | np.floating):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    else:
        assert found == expected


def without_ids(found: Any) -> Any:
    """A tool call bears an id of its own."""
    if isinstance(found, dict):
        return {key: without_ids(value) for key, value in found.items() if key not in ("id", "created")}
    return [without_ids(each) for each in found] if isinstance(found, list) else found


@pytest.mark.parametrize("scope", ["all", "response"])
@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_gives_what_a_fresh_context_gives(models: dict[str, Path], name: str, scope: Scope) -> None:
    feature = FEATURES[name]
    path = models[feature.family]
    fresh = steered(path, ANGLE, scope=scope, **feature.made)
    expected = feature.run(fresh)
    unsteered = feature.run(steered(path, None, scope=scope, **feature.made))
    assert without_ids(expected) != without_ids(unsteered)
    assert fresh._hook.went_inside
    with path_forced("stop"):
        stopping = feature.run(steered(path, ANGLE, scope=scope, **feature.made))
    assert without_ids(stopping) == without_ids(expected)
    used = steered(path, OTHER, scope=scope, **feature.made)
    feature.run(used)
    used.angle = None
    assert_same(feature.run(used), unsteered)
    used.angle = ANGLE
    assert_same(feature.run(used), expected)
    assert_same(feature.run(used), expected)


@pytest.mark.parametrize("scope", ["all", "response"])
@pytest.mark.parametrize("engine", ["hook", "lora"])
def test_an_adapter_of_one_s_own_and_a_steering_act_together(
    models: dict[str, Path], tmp_path: Path, engine: EngineName, scope: Scope
) -> None:
    path = models["llama"]
    own, *_ = export_adapter(path, tmp_path / "own", [(steering_for(path, seed=7, name="own"), 60.0)])
    made: dict[str, Any] = {"engine": engine, "scope": scope, "lora_path": str(own), "lora_scale": 0.5}
    run = completed(logprobs=2, echo=True)
    found = {angle: run(steered(path, angle, logits_all=True, **made)) for angle in (ANGLE, None)}
    alone = run(steered(path, ANGLE, engine, scope=scope, logits_all=True))
    assert found[ANGLE] not in (found[None], alone)
    used = steered(path, OTHER, logits_all=True, **made)
    for angle in (OTHER, None, ANGLE, None, ANGLE):
        used.angle = angle
        said = run(used)
        if angle in found:
            assert_same(said, found[angle])


@pytest.mark.parametrize("cache", [LlamaRAMCache, LlamaDiskCache])
@pytest.mark.parametrize("scope", ["all", "response"])
def test_a_cache_of_states_hands_over_none_of_another_angle(
    models: dict[str, Path], tmp_path: Path, scope: Scope, cache: Any
) -> None:
    path, run = models["llama"], completed(logprobs=2, echo=True)
    expected = {angle: run(steered(path, angle, scope=scope, logits_all=True)) for angle in (ANGLE, OTHER, None)}
    kept = cache(str(tmp_path)) if cache is LlamaDiskCache else cache()
    for _ in range(2):  # the second model finds what the first left
        llm = steered(path, OTHER, scope=scope, logits_all=True)
        llm.set_cache(kept)
        for angle in (OTHER, ANGLE, None, ANGLE, OTHER, None):
            llm.angle = angle
            assert_same(run(llm), expected[angle])
            llm.reset()


@pytest.mark.parametrize("scope", ["all", "response"])
def test_a_loaded_state_gives_no_logprobs_of_another_angle(models: dict[str, Path], scope: Scope) -> None:
    path, run = models["llama"], completed(logprobs=2, echo=True)
    expected = {angle: run(steered(path, angle, scope=scope, logits_all=True)) for angle in (ANGLE, None)}
    writer = steered(path, OTHER, scope=scope, logits_all=True)
    run(writer)
    state = pickle.loads(pickle.dumps(writer.save_state()))
    for angle in (ANGLE, None):
        llm = steered(path, angle, scope=scope, logits_all=True)
        llm.load_state(state)
        assert_same(run(llm), expected[angle])


def test_a_pickled_model_answers_as_the_one_it_was(models: dict[str, Path]) -> None:
    for made in ({"logits_all": True, "n_batch": 8, "n_ubatch": 8}, {"flash_attn": True}, DRAFT):
        llm = steered(models["llama"], ANGLE, scope="response", **made)
        again = pickle.loads(pickle.dumps(llm))
        assert completed()(again) == completed()(llm)
        again.angle = OTHER
        assert completed()(again) == completed()(steered(models["llama"], OTHER, scope="response", **made))


def test_from_pretrained_makes_a_steered_model(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the Hub for a list of files even where all lie in local_dir, so the Hub is a made-up one here."""
    hub = pytest.importorskip("huggingface_hub")
    path = models["llama"]
    monkeypatch.setattr(hub.HfFileSystem, "ls", lambda *_, **__: ["someone/model/llama.gguf"])
    monkeypatch.setattr(hub, "hf_hub_download", lambda **_: str(path))
    for folder in ({"local_dir": str(path.parent)}, {}):
        llm = SteeredLlama.from_pretrained(
            "someone/model", "*.gguf", steering=steering_for(path), angle=ANGLE, n_ctx=256, **folder, **EXACT
        )
        assert isinstance(llm, SteeredLlama)
        assert completed()(llm) == completed()(steered(path, ANGLE))


def test_embeddings_are_refused_in_one_line(models: dict[str, Path]) -> None:
    llm = steered(models["llama"], ANGLE)
    for ask in (llm.embed, llm.create_embedding):
        with pytest.raises(SteerError, match=r"does not compute embeddings; use llama_cpp\.Llama") as said:
            ask("the rain")
        assert "\n" not in str(said.value)
    assert completed()(llm) == completed()(steered(models["llama"], ANGLE))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["suffix", "by hand"])
def test_a_gap_is_filled_steered_as_in_a_fresh_context(way: str) -> None:
    """On a coder, by llama-cpp-python's suffix and by the model's own tokens for it."""
    try:
        path = resolve("qwen2.5-coder-0.5b", fetch=True)
    except SteerError as error:
        pytest.skip(f"cannot test on the real model: {error}")
    before, behind = "def mean(values):\n    ", "\n    return total / len(values)\n"
    filled = f"<|fim_prefix|>{before}<|fim_suffix|>{behind}<|fim_middle|>"

    def run(llm: SteeredLlama) -> Any:
        asked = {"prompt": before, "suffix": behind} if way == "suffix" else {"prompt": filled}
        return llm.create_completion(**asked, **GREEDY | {"max_tokens": 24})["choices"][0]["text"]

    def opened(dial: float | None) -> SteeredLlama:
        return SteeredLlama(path, steering=steering_for(path, "addition"), angle=dial, n_ctx=512, **EXACT)

    expected = {dial: run(opened(dial)) for dial in (None, 1.0)}
    assert expected[None] != expected[1.0]
    if way == "by hand":
        assert "total" in expected[None]
    used = opened(-1.0)
    for dial in (-1.0, 1.0, None, 1.0):
        used.angle = dial
        assert run(used) == expected.get(dial, run(used))
