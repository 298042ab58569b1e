"""Tokenizers of the kinds that families have become vocabularies with which llama.cpp splits text alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from directories import convert, edit, nothing_left, rewrite
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edge_steer.converters.same_tokens import TEXT
from edge_steer.errors import SteerError
from edge_steer.gguf_metadata import read_gguf

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
PATTERN = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
}
PATTERN["qwen2"] = PATTERN["llama3"].replace("{1,3}", "")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny.build("llama", tmp_path / "source").hf_dir


def give(directory: Path, tokenizer: Tokenizer, rows: int = 0, **config: Any) -> Path:
    """Put a tokenizer into the directory, and an embedding of as many rows as it has tokens, or of `rows`."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    size = rows or tokenizer.get_vocab_size()

    def resize(weights: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name].repeat(size // len(weights[name]) + 1, 1)[:size].contiguous()

    rewrite(directory, resize)
    edit(directory / "config.json", lambda values: values.update(vocab_size=size))
    return directory


def pieces(prepend: str) -> Tokenizer:
    """SentencePiece's BPE as transformers has it: Llama-2's way with spaces, Mistral's, or Gemma's."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=list(SPECIAL), show_progress=False)
    trained.train_from_iterator(TEXT, trainer)
    model = json.loads(trained.to_str())["model"]
    runs = [(one, other) for one in range(1, 31) for other in range(1, 32 - one)]
    order = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *("▁" * length for length in range(2, 32))]
    order += [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if token not in order]
    merges = [("▁" * one, "▁" * other) for one, other in sorted(runs, key=sum)]
    merges += [tuple(merge) for merge in model["merges"]]
    numbered = {token: number for number, token in enumerate(order)}
    tokenizer = Tokenizer(models.BPE(numbered, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif prepend == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def byte_level(*before: Any, ignore_merges: bool = False, added: Sequence[AddedToken] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    own = not before or isinstance(before[0], pre_tokenizers.Digits)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT] * 3, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


@pytest.mark.parametrize("way", ["normalizer", "metaspace", "gemma"])
def test_sentencepiece_s_bpe_splits_alike(directory: Path, tmp_path: Path, way: str) -> None:
    convert(give(directory, pieces(way)), tmp_path / "out.gguf")
    found = {key: value.value for key, value in read_gguf(tmp_path / "out.gguf", lambda key: True).values.items()}
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is (way != "gemma")
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.bos_token_id"] == 2
    types = found["tokenizer.ggml.token_type"]
    assert list(types[:6]) == [3, 3, 3, 3, 6, 6]
    runs = found["tokenizer.ggml.tokens"][260:262]
    assert (runs, list(types[260:262])) == ((["  ", "   "], [4, 4]) if way == "gemma" else (["▁▁", "▁▁▁"], [1, 1]))


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("gpt-2", lambda: byte_level()),
        ("smollm", lambda: byte_level(pre_tokenizers.Digits(individual_digits=True))),
        ("llama-bpe", lambda: byte_level(split("llama3"), ignore_merges=True)),
        ("dbrx", lambda: byte_level(split("llama3"))),
        ("qwen2", lambda: byte_level(split("qwen2"))),
    ],
)
def test_byte_level_bpe_splits_alike(directory: Path, tmp_path: Path, name: str, tokenizer: Any) -> None:
    convert(give(directory, tokenizer()), tmp_path / "out.gguf")
    values = read_gguf(tmp_path / "out.gguf", lambda key: True).values
    assert values["tokenizer.ggml.pre"].value == name
    assert values["tokenizer.ggml.add_bos_token"].value is False, "whatever llama.cpp's default is"


def split(name: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(PATTERN[name]), "isolated")


def test_a_name_that_splits_otherwise_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    tokenizer = byte_level(pre_tokenizers.Punctuation(), split("llama3"))
    with pytest.raises(SteerError, match="'gpt-2' splits text differently"):
        convert(give(directory, tokenizer), tmp_path / "out" / "out.gguf", pre="gpt-2")
    assert nothing_left(tmp_path / "out")


def test_added_tokens_keep_their_kind_and_what_is_missing_is_filled(directory: Path, tmp_path: Path) -> None:
    added = [AddedToken("<tool>", special=False, normalized=False), AddedToken("<x>", special=True)]
    tokenizer = byte_level(added=added)
    size = tokenizer.get_vocab_size()
    convert(give(directory, tokenizer, rows=size + 2), tmp_path / "more.gguf")
    values = read_gguf(tmp_path / "more.gguf", lambda key: True).values
    assert values["tokenizer.ggml.tokens"].value[-4:] == ["<tool>", "<x>", f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert list(values["tokenizer.ggml.token_type"].value[-4:]) == [4, 3, 5, 5]
    convert(give(directory, tokenizer, rows=size - 1), tmp_path / "fewer.gguf")
    values = read_gguf(tmp_path / "fewer.gguf", lambda key: True).values
    assert values["tokenizer.ggml.tokens"].value[-1] == "<tool>"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_is_found_where_either_release_keeps_it(directory: Path, tmp_path: Path, place: str) -> None:
    (directory / "chat_template.jinja").unlink()
    if place.endswith("jinja"):
        (directory / place).write_text("{{ messages }}")
    else:
        edit(directory / place, lambda values: values.update(chat_template="{{ messages }}"))
    convert(directory, tmp_path / "out.gguf")
    values = read_gguf(tmp_path / "out.gguf", lambda key: True).values
    assert values["tokenizer.chat_template"].value == "{{ messages }}"


def test_special_ids_come_from_config_json_where_the_tokenizer_does_not_say(directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer_config.json").unlink()
    edit(directory / "config.json", lambda values: values.update(eos_token_id=260, pad_token_id=[1, 2]))
    convert(directory, tmp_path / "out.gguf")
    values = read_gguf(tmp_path / "out.gguf", lambda key: True).values
    assert values["tokenizer.ggml.eos_token_id"].value == 260
    assert "tokenizer.ggml.padding_token_id" not in values
