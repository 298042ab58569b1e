"""A reading is h·b1 at its site before it is turned there, in units of the class means, for every token evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray
from planted import random_steering

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
import torch

from edge_steer import SteerError
from edge_steer.architectures import MODEL_TYPES, architecture
from edge_steer.model_file import read_model
from edge_steer.runtime.answer import Answer, Piece, Sampling, stream_pieces
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.reading import read_site
from edge_steer.sites import Site, site_of_module
from edge_steer.steering import Steering

EXACT: dict[str, Any] = {
    "type_k": llama_cpp.GGML_TYPE_F32,
    "type_v": llama_cpp.GGML_TYPE_F32,
    "n_threads": 1,
    "n_threads_batch": 1,
}
PROMPT = [256, *range(30, 67)]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyModel:
    return tiny.build(request.param, tmp_path_factory.mktemp("tiny"))


def steering_for(model: tiny.TinyModel, seed: int = 0, name: str = "happy", kinds: str | None = None) -> Steering:
    """Steered at every norm, with class means of its own at each site."""
    file = read_model(model.gguf_path)
    arch = architecture(file.architecture)
    steering = random_steering(
        file.base, arch.sites(file.block_count, *([kinds] if kinds else [])), name=name, seed=seed
    )
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(len(steering.sites), 2))
    separation = [2.0 + site.layer for site in steering.sites]
    return steering.with_(class_means=means, separation=separation)


def steered(model: tiny.TinyModel, *steerings: Steering, angle: float | None = None, **llama: object) -> SteeredLlama:
    made: dict[str, object] = {"n_ctx": 256, "n_batch": 32, "n_ubatch": 8, **EXACT, **llama}
    angles = {each.name: angle for each in steerings}
    return SteeredLlama(model.gguf_path, steering=steerings, angles=angles, **made)


def oracle(
    model: tiny.TinyModel, tokens: Sequence[int], steering: Steering, site: Site, angle: float | None
) -> NDArray[np.float64]:
    """The readings (n,) by transformers: h·b1 of the module's output, taken before the steering turns it."""
    torch_model = tiny._loaded(model.hf_dir)
    known = architecture(MODEL_TYPES[torch_model.config.model_type])
    module = next(each for name, each in torch_model.named_modules() if site_of_module(known, name) == site)
    kept: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output)[0].double().clone())

    hook = module.register_forward_hook(keep)  # before those that turn
    try:
        tiny.torch_logits(model.hf_dir, tokens, [(steering, angle)])
    finally:
        hook.remove()
    p = kept[0].numpy() @ steering.basis_at(site)[0].astype(np.float64)
    negative, positive = steering.class_means[steering.sites.index(site)].astype(np.float64)
    found: NDArray[np.float64] = (2 * p - (positive + negative)) / (positive - negative)
    return found


def bound(model: tiny.TinyModel) -> float:
    """Gemma's GELU is a table of half-precision numbers in ggml's CPU backend."""
    return 2e-3 if model.family.startswith("gemma") else 2e-5


def close(model: tiny.TinyModel, found: NDArray[np.float32], expected: NDArray[np.float64]) -> bool:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return bool(np.abs(found - expected).max() <= bound(model) * np.abs(expected).max())


@pytest.mark.parametrize("angle", [None, 20.0])
@pytest.mark.parametrize("path", ["auto", "copy"])
def test_every_token_of_a_prompt_is_read_as_transformers_has_it(
    model: tiny.TinyModel, angle: float | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_STEER_HOOK", path)
    steering = steering_for(model)
    llm = steered(model, steering, angle=angle)
    site = llm.token_readings.site("happy")
    assert site.layer == 1
    expected = oracle(model, PROMPT, steering, site, angle)
    assert close(model, llm.read(PROMPT)["happy"], expected)
    assert close(model, llm.read(PROMPT[:20])["happy"], expected[:20]), "from the cache"
    longer = [*PROMPT, 99, 98]
    assert close(model, llm.read(longer)["happy"], oracle(model, longer, steering, site, angle))
    unlike = oracle(model, PROMPT, steering, site, 20.0 if angle is None else None)
    assert not close(model, llm.read(PROMPT)["happy"], unlike)


def test_another_site_may_be_read_and_several_steerings_at_once(model: tiny.TinyModel) -> None:
    one, other = steering_for(model), steering_for(model, seed=1, name="formal")
    llm = steered(model, one, other)
    for site in (Site(0, "ffn_norm"), Site(1, "attn_norm")):
        llm.token_readings.choose("formal", site)
        found = llm.read(PROMPT)
        assert close(model, found["happy"], oracle(model, PROMPT, one, llm.token_readings.site("happy"), None))
        assert close(model, found["formal"], oracle(model, PROMPT, other, site, None))
    assert list(llm.read(PROMPT, ["formal"])) == ["formal"]


def test_the_stream_is_read_too(model: tiny.TinyModel) -> None:
    steering = steering_for(model, kinds="layer_out")
    llm = steered(model, steering)
    site = llm.token_readings.site("happy")
    assert site == Site(1, "layer_out")
    assert close(model, llm.read(PROMPT)["happy"], oracle(model, PROMPT, steering, site, None))


@pytest.mark.parametrize("angle", [None, 20.0])
def test_reading_changes_no_logit(model: tiny.TinyModel, angle: float | None) -> None:
    plain = steered(model, steering_for(model), angle=angle)
    read = steered(model, steering_for(model), angle=angle)
    with read.token_readings.of(["happy"]):
        for tokens in (PROMPT, [*PROMPT, 77]):
            for llm in (plain, read):
                llm.eval(tokens[llm.n_tokens :])
            np.testing.assert_array_equal(read.last_logits(), plain.last_logits())
        assert not np.isnan(read.token_readings.first("happy", len(PROMPT) + 1)).any()


def test_tokens_evaluated_while_nobody_reads_are_evaluated_again_to_be_read(model: tiny.TinyModel) -> None:
    steering = steering_for(model)
    llm = steered(model, steering)
    expected = oracle(model, PROMPT, steering, llm.token_readings.site("happy"), None)
    llm.eval(PROMPT)
    assert close(model, llm.read(PROMPT)["happy"], expected)
    llm.reset()
    llm.eval(PROMPT[:10])
    with llm.token_readings.of(["happy"]):
        llm.eval(PROMPT[10:])
    assert llm.token_readings.count_known(["happy"], len(PROMPT)) == 0
    assert np.isnan(llm.token_readings.at("happy", 9))
    assert close(model, llm.token_readings.first("happy", len(PROMPT))[10:], expected[10:])
    assert close(model, llm.read(PROMPT)["happy"], expected)
    llm.load_state(llm.save_state())
    assert llm.token_readings.count_known(["happy"], len(PROMPT)) == 0
    assert close(model, llm.read(PROMPT)["happy"], expected)


def test_a_turned_dial_is_read_anew(model: tiny.TinyModel) -> None:
    steering = steering_for(model)
    llm = steered(model, steering)
    site = llm.token_readings.site("happy")
    for angle in (None, 15.0, -15.0):
        llm.angle = angle
        assert close(model, llm.read(PROMPT)["happy"], oracle(model, PROMPT, steering, site, angle))


def test_a_prompt_is_read_unsteered_but_for_its_last_token_where_the_answer_alone_is_steered(
    model: tiny.TinyModel,
) -> None:
    steering = steering_for(model)
    llm = steered(model, steering, angle=20.0, scope="response")
    expected = oracle(model, PROMPT, steering, llm.token_readings.site("happy"), None)
    found = llm.read(PROMPT)["happy"]
    assert close(model, found[:-1], expected[:-1])
    assert abs(found[-1] - expected[-1]) > bound(model) * np.abs(expected).max()


def pieces_of(llm: SteeredLlama, sampling: Sampling, prompt: Sequence[int] = PROMPT) -> tuple[list[Piece], Answer]:
    stream, pieces = stream_pieces(llm, prompt, sampling), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("angle", [None, 20.0])
@pytest.mark.parametrize("how", [{}, {"logit_bias": {40: 0.0}}, {"max_tokens": 1}], ids=["plain", "biased", "short"])
def test_every_token_of_an_answer_is_read_and_the_answer_is_the_same(
    model: tiny.TinyModel, angle: float | None, how: dict[str, Any]
) -> None:
    steering = steering_for(model)
    sampling = Sampling(**{"max_tokens": 12, "read": ("happy",), **how})
    plain, unread = pieces_of(steered(model, steering, angle=angle), replace(sampling, read=()))
    llm = steered(model, steering, angle=angle)
    llm.eval(PROMPT)  # cached, and not read
    pieces, answer = pieces_of(llm, sampling)
    assert [piece.text for piece in pieces] == [piece.text for piece in plain]
    assert (answer.text, answer.generated_tokens, answer.finish) == (
        unread.text,
        unread.generated_tokens,
        unread.finish,
    )
    assert unread.readings is None
    assert all(piece.readings is None for piece in plain)
    count = answer.generated_tokens
    tokens = llm.input_ids[: len(PROMPT) + count].tolist()
    expected = oracle(model, tokens, steering, llm.token_readings.site("happy"), angle)
    assert answer.prompt_readings is not None
    assert answer.readings is not None
    assert close(model, np.concatenate([answer.prompt_readings["happy"], answer.readings["happy"]]), expected)
    told = [piece.readings["happy"] for piece in pieces[:count] if piece.readings]
    assert told == [float(each) for each in answer.readings["happy"]]
    assert all(piece.readings is None for piece in pieces[count:])


def test_an_answer_that_a_stop_text_ends_is_read_to_its_last_token(model: tiny.TinyModel) -> None:
    llm = steered(model, steering_for(model))
    whole = pieces_of(llm, Sampling(max_tokens=12))[1].text
    pieces, answer = pieces_of(llm, Sampling(max_tokens=12, stop=(whole[4:6],), read=("happy",)))
    assert answer.finish == "stop"
    assert 0 < answer.generated_tokens < 12
    assert answer.readings is not None
    assert not np.isnan(answer.readings["happy"]).any()
    assert len(pieces) == answer.generated_tokens
    after, _ = pieces_of(llm, Sampling(max_tokens=12))  # what was evaluated more leaves no trace
    assert "".join(piece.text for piece in after) == whole


def test_an_answer_that_fills_the_context_is_read_to_its_last_token(model: tiny.TinyModel) -> None:
    llm = steered(model, steering_for(model))
    prompt = [256, *(30 + i % 200 for i in range(llm.n_ctx() - 5))]
    _, answer = pieces_of(llm, Sampling(read=("happy",)), prompt)
    assert answer.readings is not None
    assert len(answer.readings["happy"]) == answer.generated_tokens
    assert not np.isnan(answer.readings["happy"]).any()


def test_a_reading_that_is_left_ends(model: tiny.TinyModel) -> None:
    llm = steered(model, steering_for(model))
    stream = stream_pieces(llm, PROMPT, Sampling(max_tokens=12, read=("happy",)))
    next(stream)
    stream.close()
    pieces_of(llm, Sampling(max_tokens=4), [256, 90, 91])
    assert np.isnan(llm.token_readings.first("happy", 3)[1:]).all()


def test_a_model_may_be_closed_while_it_is_read(model: tiny.TinyModel) -> None:
    for read in ((), ("happy",)):
        llm = steered(model, steering_for(model))
        stream = stream_pieces(llm, PROMPT, Sampling(max_tokens=12, read=read))
        next(stream)
        llm.close()
        stream.close()


def test_what_cannot_be_read_is_refused_in_a_line(model: tiny.TinyModel) -> None:
    steering = steering_for(model)
    older = steering_for(model, seed=1, name="older").with_(class_means=np.empty((0, 2)))
    last = steering.with_(name="last")
    llm = steered(model, older, last)
    for names, why in ((["older"], "holds no class means.*calibrate it again"), (["sad"], "expected a steering among")):
        with pytest.raises(SteerError, match=why) as caught:
            llm.read(PROMPT, names)
        assert "\n" not in str(caught.value)
    for site, why in ((Site(2, "attn_norm"), "before the last block"), (Site(0, "output_norm"), "expected a site of")):
        llm.token_readings.choose("last", site)
        with pytest.raises(SteerError, match=why):
            llm.read(PROMPT, ["last"])
    with pytest.raises(SteerError, match="1 to 256 tokens, got 0"):
        llm.read([], [])
    llm.token_readings.choose("last", None)
    assert len(llm.read("hello", ["last"])["last"]) == len(llm.text_tokens("hello"))
    chat = [{"role": "user", "content": "hello"}]
    assert len(llm.read(chat, ["last"])["last"]) == len(llm.chat_tokens(chat))


def test_the_site_of_the_largest_separation_before_the_last_block_is_read(tmp_path: Path) -> None:
    steering = steering_for(tiny.build("llama", tmp_path))
    assert steering.separation.argmax() >= len(steering.sites) - 2  # in the last block
    assert read_site(steering) == Site(1, "attn_norm")
    apart = steering.class_means.copy()
    apart[steering.sites.index(Site(1, "attn_norm"))] = 1.0  # no units there
    assert read_site(steering.with_(class_means=apart)) == Site(1, "ffn_norm")
    assert steering.with_(class_means=apart).fingerprint == steering.fingerprint
