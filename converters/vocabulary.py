"""tokenizer.json to the `tokenizer.*` keys of GGUF: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama").

Letters: V rows of the embedding, which is how many tokens the GGUF must have.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from edge_steer.converters import pre_tokenizer
from edge_steer.errors import FormatError, SteerError
from edge_steer.json_file import read_json

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# SentencePiece gives no score to what it never merges.
_NO_SCORE = -1000.0


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says about a tokenizer.

    model: `gpt2` or `llama`. tokens, types: (V,). scores: (V,) for `llama`, empty for `gpt2`. space_first: a space is
    put before the text. special: ids, what is added to a text, chat template, and for `gpt2` merges. described: the
    tokenizer.json it was made from, with the pre-tokenizer that was asked for in place of its own.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    space_first: bool
    special: SpecialVocab
    described: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """As `model_file` computes it: of the tokens, each after its length as uint64."""
        digest = hashlib.sha256()
        for token in self.tokens:
            encoded = token.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.types))
        writer.add_add_space_prefix(self.space_first)
        self.special.add_to_gguf(writer, quiet=True)


def read_vocabulary(directory: Path, size: int, pre: str | None) -> Vocabulary:
    """The tokenizer of `directory` for an embedding of `size` rows; `pre` overrides what its pre-tokenizer is.

    Raises SteerError if the tokenizer is of a kind that llama.cpp or this converter does not have.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise SteerError(
            f"{directory}: expected tokenizer.json, found none; save the tokenizer with "
            "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    tokenizer = read_json(path)
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), Mapping):
        kind = model.get("type") if isinstance(model, Mapping) else model
        raise SteerError(
            f"{path}: expected a BPE tokenizer with its vocabulary, got {kind!r}; use llama.cpp's own converter"
        )
    tokens, types = _tokens(path, tokenizer, model["vocab"], size)
    pieces = bool(model.get("byte_fallback"))
    special = _special(directory, path, size, with_merges=not pieces)
    if not pieces:
        name, instead = pre_tokenizer.choose(tokenizer, pre)
        if instead is not None:
            warnings.warn(
                f"{path} itself does not split text as {name}; compared with a tokenizer that does", stacklevel=3
            )
            tokenizer = {**tokenizer, "pre_tokenizer": instead}
        return Vocabulary("gpt2", name, tuple(tokens), tuple(types), (), False, special, tokenizer)

    space_first = _space_first(path, tokenizer)
    missing = [byte for byte in (f"<0x{value:02X}>" for value in range(256)) if byte not in model["vocab"]]
    if missing:
        raise FormatError(f"{path}: expected a token for every byte, found none for {missing[0]}")
    for number, token in enumerate(tokens):
        if _BYTE.fullmatch(token):
            types[number] = TokenType.BYTE
        elif not space_first and len(token) > 1 and set(token) == {_SPACE} and types[number] == TokenType.NORMAL:
            # Where text begins without a space of its own (Gemma), runs of spaces are found before any merging.
            types[number] = TokenType.USER_DEFINED
        if types[number] == TokenType.USER_DEFINED:
            tokens[number] = token.replace(_SPACE, " ")
    scores = _scores(path, model.get("merges"), tokens, types)
    _demand_unique(path, tokens)
    return Vocabulary("llama", pre or "default", tuple(tokens), tuple(types), scores, space_first, special, tokenizer)


def _tokens(
    path: Path, tokenizer: Mapping[str, Any], vocabulary: Mapping[str, Any], size: int
) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that no token has are unused, ids past the embedding have no token."""
    found: dict[int, tuple[str, int]] = {}
    added = tokenizer.get("added_tokens") or []
    try:
        given = [(number, token, TokenType.NORMAL) for token, number in vocabulary.items()]
        given += [
            (entry["id"], entry["content"], TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED)
            for entry in added
        ]
    except (KeyError, TypeError):
        raise FormatError(f"{path}: expected added_tokens with id, content and special") from None
    for number, token, kind in given:
        if not isinstance(number, int) or number < 0 or not isinstance(token, str) or not token:
            raise FormatError(f"{path}: expected tokens with numbers, got {token!r} with {number!r}")
        if number < size:
            found[number] = (token, int(kind))
    unused = int(TokenType.UNUSED)
    listed = [found.get(number, (f"[PAD{number}]", unused)) for number in range(size)]
    tokens = [token for token, _ in listed]
    _demand_unique(path, tokens)
    return tokens, [kind for _, kind in listed]


def _demand_unique(path: Path, tokens: list[str]) -> None:
    # llama.cpp ends the process on two tokens of one text.
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise FormatError(f"{path}: expected every token once, got {twice!r} twice")


def _special(directory: Path, path: Path, size: int, with_merges: bool) -> SpecialVocab:
    """Special ids, the chat template, and whether the tokenizer itself puts them around a text."""
    from tokenizers import Tokenizer

    for name in ("tokenizer_config.json", "generation_config.json"):
        if (directory / name).is_file():
            read_json(directory / name)  # gguf's reader of these has no errors of its own
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of templates for two texts, which GGUF has not
    try:
        special = SpecialVocab(directory, load_merges=with_merges, n_vocab=size)
        ids = Tokenizer.from_file(str(path)).encode("x", add_special_tokens=True).ids
    except Exception as error:  # gguf raises what it meets, tokenizers a bare Exception
        raise FormatError(f"{path}: expected a tokenizer as save_pretrained writes it, got {error}") from None
    if with_merges and not special.merges:
        raise FormatError(f"{path}: expected merges, found none")
    for kind, place in (("bos", 0), ("eos", -1)):
        there = len(ids) > 1 and ids[place] == special.special_token_ids.get(kind)
        special.add_special_token.setdefault(kind, there)
    return special


def is_metaspace(tokenizer: Mapping[str, Any]) -> bool:
    """Whether spaces are handled by transformers' Metaspace, which puts none before a text that begins with one."""
    section = tokenizer.get("pre_tokenizer")
    return isinstance(section, Mapping) and section.get("type") == "Metaspace"


def _space_first(path: Path, tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text. Raises SteerError for what is neither Llama-2's way nor Gemma's."""
    normalizer, splitter = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, Mapping) else []
    kinds = [step.get("type") for step in steps]
    if not splitter and kinds == ["Prepend", "Replace"]:
        return True
    if is_metaspace(tokenizer) and not kinds:
        return bool(splitter.get("prepend_scheme", "always") != "never")
    if kinds == ["Replace"] and splitter.get("type") in (None, "Split"):
        return False
    raise SteerError(f"{path}: expected SentencePiece's handling of spaces, got another; use llama.cpp's own converter")


def _scores(path: Path, merges: Any, tokens: list[str], types: list[int]) -> tuple[float, ...]:
    """SentencePiece merges what scores highest; here, what a merge of lower rank makes. Unmerged ones come last."""
    ranks: dict[str, int] = {}
    if not isinstance(merges, list) or not merges:
        raise FormatError(f"{path}: expected merges, found none")
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise FormatError(f"{path}: expected merges of two tokens, got {merge!r}")
        ranks.setdefault("".join(pair), rank)
    normal = [number for number, kind in enumerate(types) if kind == TokenType.NORMAL]
    order = sorted(normal, key=lambda number: (ranks.get(tokens[number], len(merges)), number))
    scores = [0.0 if kind == TokenType.BYTE else _NO_SCORE for kind in types]
    for place, number in enumerate(order):
        scores[number] = -float(place)
    return tuple(scores)
