"""llama.cpp's name for a pre-tokenizer is told from tokenizer.json's own section, however families write it."""

from __future__ import annotations

from typing import Any

import pytest

from edge_steer.converters.pre_tokenizer import choose, recognise
from edge_steer.errors import SteerError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(**options: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **options}


def split(regex: str, **options: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **options}


def tokenizer(*steps: dict[str, Any], ignore_merges: bool = False) -> dict[str, Any]:
    section = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    return {"pre_tokenizer": section, "model": {"type": "BPE", "ignore_merges": ignore_merges}}


PLAIN = byte_level(use_regex=False)
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("llama-bpe", tokenizer(split(LLAMA3), PLAIN, ignore_merges=True)),
        ("dbrx", tokenizer(split(LLAMA3), PLAIN)),
        ("qwen2", tokenizer(split(QWEN2), PLAIN)),
        ("qwen2", tokenizer(split(QWEN2, behavior="Removed", invert=True), PLAIN)),
        ("qwen2", tokenizer(split(QWEN2.replace(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")), PLAIN)),
        ("smollm", tokenizer(DIGITS, byte_level())),
        ("gpt-2", tokenizer(byte_level())),
        ("gpt-2", tokenizer({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False})),
        ("tekken", tokenizer(split(TEKKEN), PLAIN, ignore_merges=True)),
        ("gpt-4o", tokenizer(split(O200K), PLAIN)),
    ],
    ids=["Llama-3", "Phi-4", "Qwen2", "Qwen2 the other way round", "Qwen2 spelt out", "SmolLM2", "GPT-2",
         "GPT-2 of older files", "Mistral-Nemo", "Phi-4-mini"],
)  # fmt: skip
def test_a_family_s_pre_tokenizer_has_its_name(name: str, described: dict[str, Any]) -> None:
    assert recognise(described) == name
    assert choose(described, None) == (name, None)
    assert choose(described, name) == (name, None)


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": None}},
        tokenizer(PLAIN),
        tokenizer(byte_level(add_prefix_space=True)),
        tokenizer(byte_level(), ignore_merges=True),
        tokenizer({"type": "Digits", "individual_digits": False}, byte_level()),
        tokenizer({"type": "Punctuation", "behavior": "Isolated"}, DIGITS, byte_level()),
        tokenizer(split(LLAMA3), byte_level()),
        tokenizer(split(LLAMA3, invert=True), PLAIN),
        tokenizer(split(LLAMA3, behavior="MergedWithNext"), PLAIN),
        tokenizer({"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}, PLAIN),
        tokenizer(split(LLAMA3.replace("{1,3}", "{1,4}")), PLAIN),
        tokenizer(split(QWEN2), PLAIN, ignore_merges=True),
        tokenizer({"type": "Whitespace"}),
    ],
)
def test_what_is_not_in_the_table_has_no_name(described: dict[str, Any]) -> None:
    assert recognise(described) is None
    with pytest.raises(SteerError, match="--pre NAME"):
        choose(described, None)
    assert choose(described, "command-r") == ("command-r", None)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"])
def test_another_name_for_a_known_one_brings_the_section_that_it_stands_for(name: str) -> None:
    described = tokenizer(byte_level()) if name != "gpt-2" else tokenizer(DIGITS, byte_level())
    found, section = choose(described, name)
    assert found == name
    assert section is not None
    whole_words = name in ("llama-bpe", "tekken")
    assert recognise({"pre_tokenizer": section, "model": {"ignore_merges": whole_words}}) == name
    assert choose(described, "falcon") == ("falcon", None)
