"""SteeredLlama is a llama_cpp.Llama, and refuses what cannot act."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama
from llama_cpp._internals import LlamaBatch
from llama_cpp.llama_tokenizer import LlamaTokenizer
from planted import random_steering

pytest.importorskip("torch")
pytest.importorskip("transformers")


from edge_steer import MismatchError, NoEffectError, SteerError
from edge_steer.architectures import architecture
from edge_steer.model_file import read_model
from edge_steer.runtime import llama as seam
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.sites import Architecture, Site, SiteKind
from edge_steer.steering import Steering

ONE_THREAD: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "n_ctx": 256}
CHAT = [{"role": "user", "content": "Hello there"}]


def steering_for(model: Path, **kwargs: object) -> Steering:
    file = read_model(model)
    return random_steering(file.base, architecture(file.architecture).sites(file.block_count), **kwargs)  # type: ignore[arg-type]


def test_off_is_a_plain_llama_to_the_bit(model: Path) -> None:
    plain = Llama(str(model), verbose=False, **ONE_THREAD)
    off = SteeredLlama(model, steering=steering_for(model), angle=None, **ONE_THREAD)
    assert isinstance(off, Llama)
    for llm in (plain, off):
        llm.reset()
        llm.eval([256, 40, 50, 60])
    logits = [np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)) for llm in (plain, off)]
    assert (logits[0] == logits[1]).all()
    assert off.sites_hit == 0


def test_off_asks_llama_cpp_for_no_node(model: Path) -> None:
    off = SteeredLlama(model, steering=steering_for(model), angle=None, **ONE_THREAD)
    off.eval([256, 40, 50])
    assert not off._hook.reached.any()
    off.angle = 10
    off.eval([60])
    assert off._hook.reached.sum() == off.sites_hit == 6


def test_streaming_chat_and_completion_agree(model: Path) -> None:
    llm = SteeredLlama(model, steering=steering_for(model), angle=30, **ONE_THREAD)
    whole = llm.create_chat_completion(messages=CHAT, max_tokens=8, temperature=0)["choices"][0]["message"]["content"]
    stream = llm.create_chat_completion(messages=CHAT, max_tokens=8, temperature=0, stream=True)
    streamed = "".join(part["choices"][0]["delta"].get("content") or "" for part in stream)
    # A random model also ends in the middle of a character, which only the whole answer shows.
    assert streamed
    assert whole.startswith(streamed)
    completion = llm.create_completion(llm.chat_tokens(CHAT), max_tokens=8, temperature=0)["choices"][0]["text"]
    assert completion == whole
    assert llm.sites_hit == 6


def test_a_value_a_path_and_several_steerings_are_accepted(model: Path, tmp_path: Path) -> None:
    one, other = steering_for(model, name="one"), steering_for(model, name="other", seed=5)
    one.with_(angle=12.0).save(tmp_path / "one.gguf")
    llm = SteeredLlama(model, steering=[tmp_path / "one.gguf", other], angles={"other": -3}, **ONE_THREAD)
    assert dict(llm.angles) == {"one": 12.0, "other": -3.0}
    llm.angles["one"] = None
    llm.angles = {"other": 4}
    assert dict(llm.angles) == {"one": None, "other": 4.0}
    with pytest.raises(SteerError, match="use angles"):
        llm.angle = 3
    with pytest.raises(SteerError, match="one, other"):
        llm.angles["third"] = 3
    with pytest.raises(SteerError, match="two steerings are called"):
        SteeredLlama(model, steering=[one, one.with_(angle=1.0)], angles={"one": 3}, **ONE_THREAD)


def test_without_a_dial_anywhere_it_loads_at_off_and_says_so(model: Path) -> None:
    with pytest.warns(UserWarning, match="has no default angle, so it is off"):
        llm = SteeredLlama(model, steering=steering_for(model), **ONE_THREAD)
    assert llm.angle is None
    llm.angle = 30
    llm.eval([256, 40])
    assert llm.sites_hit


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), True])
def test_a_dial_that_is_no_finite_number_is_refused(model: Path, bad: float) -> None:
    llm = SteeredLlama(model, steering=steering_for(model), angle=5, **ONE_THREAD)
    with pytest.raises(SteerError, match="finite number"):
        llm.angle = bad
    assert llm.angle == 5


def test_a_steering_for_another_model_is_refused_with_both_values(model: Path) -> None:
    steering = steering_for(model)
    longer = steering.with_(base=dataclasses.replace(steering.base, block_count=9))
    with pytest.raises(MismatchError, match=r"9.*3"):
        SteeredLlama(model, steering=longer, angle=5, **ONE_THREAD)
    other = steering.with_(base=dataclasses.replace(steering.base, architecture="qwen2"))
    with pytest.raises(MismatchError, match=r"qwen2.*llama"):
        SteeredLlama(model, steering=other, angle=5, **ONE_THREAD)


def test_another_tokenizer_warns(model: Path) -> None:
    steering = steering_for(model)
    other = steering.with_(base=dataclasses.replace(steering.base, tokenizer_sha256="0" * 64))
    with pytest.warns(UserWarning, match="another tokenizer"):
        SteeredLlama(model, steering=other, angle=5, **ONE_THREAD)


def test_steerings_along_the_same_direction_warn(model: Path) -> None:
    one = steering_for(model)
    with pytest.warns(UserWarning, match="overlap"):
        SteeredLlama(model, steering=[one, one.with_(name="again")], angles={"random": 5, "again": 5}, **ONE_THREAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = steering_for(model, seed=9, name="other")
        SteeredLlama(model, steering=[one, other], angles={"random": 5, "other": 5}, **ONE_THREAD)


def test_a_graph_without_the_named_tensor_is_an_error_that_lists_what_it_has(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if llama.cpp had renamed the node."""
    known = architecture("llama")
    renamed = Architecture(
        "llama", {**known.kinds, "ffn_norm": SiteKind("ffn_norm_new", "post_attention_layernorm", ())}
    )
    monkeypatch.setattr(seam, "architecture", lambda *_: renamed)
    llm = SteeredLlama(model, steering=steering_for(model), angle=5, **ONE_THREAD)
    with pytest.raises(NoEffectError, match=r"met 3 of its 6 sites.*blk\.0\.ffn_norm.*attn_norm.*ffn_norm"):
        llm.eval([256, 40])
    assert llm.n_tokens == 0


def test_an_unknown_architecture_is_an_error(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(path, "strange")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SteerError, match=r"'strange'.*llama"):
        SteeredLlama(path, **ONE_THREAD)


def test_a_site_that_the_architecture_lacks_is_an_error(model: Path) -> None:
    file = read_model(model)
    with pytest.raises(NoEffectError, match=r"blk\.1\.ffn_post_norm"):
        SteeredLlama(model, steering=random_steering(file.base, [Site(1, "ffn_post_norm")]), angle=5, **ONE_THREAD)


@pytest.mark.parametrize("engine", ["hook", "lora"])
def test_who_decodes_on_the_context_by_himself_is_steered_too(model: Path, engine: str) -> None:
    llm = SteeredLlama(model, steering=steering_for(model), angle=30, engine=engine, **ONE_THREAD)
    tokens = [256, 40, 50, 60]
    batch = LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    batch.set_batch(tokens, 0, True)
    for dial in (30, None, -30, 30):
        llm.angle = dial
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), -1, 0, -1)
        assert llama_cpp.llama_decode(llm.ctx, batch.batch) == 0
        found = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(len(tokens), llm.n_vocab())).copy()
        llm.reset()
        assert (found == llm.logits([*tokens, 0], 1)).all()


def test_embeddings_are_refused(model: Path) -> None:
    with pytest.raises(SteerError, match="embeddings"):
        SteeredLlama(model, embedding=True)


def test_a_tokenizer_that_is_given_is_used(model: Path) -> None:
    class Bytes(LlamaTokenizer):
        def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
            return [1, 2, 3]

    plain = Llama(str(model), verbose=False, **ONE_THREAD)
    llm = SteeredLlama(model, steering=steering_for(model), angle=5, tokenizer=Bytes(plain), **ONE_THREAD)
    assert llm.tokenize(b"anything") == [1, 2, 3]


def test_it_survives_pickling(model: Path) -> None:
    llm = SteeredLlama(model, steering=steering_for(model), angle=7, scope="response", **ONE_THREAD)
    again = pickle.loads(pickle.dumps(llm))
    assert (again.angle, again.scope, again.steerings[0].fingerprint) == (7, "response", llm.steerings[0].fingerprint)


def test_two_models_with_two_steerings_do_not_touch(model: Path) -> None:
    one = SteeredLlama(model, steering=steering_for(model), angle=30, **ONE_THREAD)
    alone = one.logits([256, 40, 50, 60, 0], 1)
    other = SteeredLlama(model, steering=steering_for(model, seed=3), angle=-80, **ONE_THREAD)
    other.eval([256, 44])
    one.reset()
    assert (one.logits([256, 40, 50, 60, 0], 1) == alone).all()
    other.close()
    one.reset()
    assert (one.logits([256, 40, 50, 60, 0], 1) == alone).all()


def test_a_model_without_a_template_is_never_given_another_model_s(gemma3: Path) -> None:
    llm = SteeredLlama(gemma3, **ONE_THREAD)
    assert llm.chat_template.is_plain
    seen: list[list[int]] = []
    create = llm.create_completion
    llm.create_completion = lambda prompt, **kwargs: (seen.append(prompt), create(prompt, **kwargs))[1]
    llm.create_chat_completion(messages=CHAT, max_tokens=1)
    assert seen[0] == llm.chat_tokens(CHAT)
    assert llm.detokenize(seen[0]).decode() == "Hello there\nAnswer:"


def test_a_block_is_steered_and_what_follows_is_as_before(model: Path) -> None:
    llm = SteeredLlama(model, steering=[steering_for(model, name="happy"), steering_for(model, name="formal")],
                       angles={"happy": 3, "formal": None}, **ONE_THREAD)  # fmt: skip
    with llm.steer(happy=8, formal=-5):
        assert dict(llm.angles) == {"happy": 8, "formal": -5}
    assert dict(llm.angles) == {"happy": 3, "formal": None}
    with pytest.raises(SteerError, match="got 'sad'"), llm.steer(happy=1, sad=2):
        pass
    assert dict(llm.angles) == {"happy": 3, "formal": None}
