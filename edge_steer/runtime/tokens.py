"""Text to tokens and back, as llama.cpp does it but for what goes wrong on the way through llama-cpp-python.

- `add_bos` is llama.cpp's `add_special`: it adds whatever the vocabulary asks for, an EOS behind the prompt too.
- A token of more than 32 bytes comes back empty, and one that the vocabulary does not have ends the process.
- Room is made for as many tokens as the model was trained for, which a file may say are four billion.
- llama.cpp does not normalise: where the tokenizer that a model was trained with composes é from e and an accent, the
  same text would be other tokens here.
"""

from __future__ import annotations

import ctypes
import unicodedata
from collections.abc import Sequence
from typing import Any

import llama_cpp

from edge_steer.errors import SteerError

# Pre-tokenizers of llama.cpp whose tokenizers normalise to NFC (their tokenizer.json says so).
COMPOSING = {"qwen2", "deepseek-r1-qwen", "olmo"}
_USUAL, _LONGEST = 64, 1 << 20  # bytes of a token


class Tokenizer:
    """What Llama asks of a tokenizer, for the vocabulary of the Llama `llm`."""

    def __init__(self, llm: Any) -> None:
        self._model = llm._model
        self._composes = llm.metadata.get("tokenizer.ggml.pre") in COMPOSING
        self._count = llm.n_vocab()
        bos = llm.token_bos()
        self._bos = [bos] if bos >= 0 and self._model.add_bos_token() else []

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Tokens of `text`; before them the BOS, where it is asked for and the vocabulary wants one."""
        if self._composes and not text.isascii():
            text = unicodedata.normalize("NFC", text.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        return [*(self._bos if add_bos else []), *self._pieces(text, special)]

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """The text of `tokens`; of a BOS at their head, without the space that Llama 1 puts behind it."""
        text = b"".join(self._piece(token, special) for token in tokens)
        return text[1:] if len(tokens) and tokens[0] == self._model.token_bos() and text[:1] == b" " else text

    def encode(self, text: str, add_bos: bool = True, special: bool = True) -> list[int]:
        return self.tokenize(text.encode(errors="ignore"), add_bos, special)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.detokenize(tokens).decode(errors="ignore")

    def _pieces(self, text: bytes, special: bool) -> list[int]:
        room = len(text) + 2  # one for each byte, and the space that some vocabularies put first
        while True:
            tokens = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self._model.vocab, text, len(text), tokens, room, False, special)
            if 0 <= count <= room:
                return list(tokens[:count])
            if not room < -count < 1 << 31:
                raise SteerError("expected a text that llama.cpp splits into tokens, got one that is too long")
            room = -count  # what it wants

    def _piece(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self._count:
            raise SteerError(f"expected a token from 0 to {self._count - 1}, got {token}")
        size = _USUAL
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            if -count > _LONGEST:
                return b""
            size = -count  # what it wants
