"""Does llama.cpp split text as the model's own tokenizer does? One multilingual text, compared token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_steer.converters.vocabulary import Vocabulary, is_metaspace
from edge_steer.errors import MismatchError, SteerError
from edge_steer.runtime.llama_log import llama_errors

# Each line tries what pre-tokenizers differ in. Composed characters only: llama.cpp does not normalise.
TEXT = (
    "Hello, world! The quick brown fox can't jump over 13 lazy dogs; they're what we'd've wanted, I'LL SAY.",
    "In 1999 it cost $3.50, in 2024: 1234567890 or 3,141.59 (12%), ½ and ٣٤٥ and 十二.",
    'def f(x: int) -> str:\n    if x >= 10:\n\t\treturn f"{x!r}"  # tab,  two   three    four\n\n\n    pass\r\n',
    "for (int i=0;i<n;++i){a[i]+=b->c;} // <tag attr='v'/> https://example.org/a_b?q=1&r=%20#top",
    "Ça va? Größenwahn, naïve façade, señor Núñez; Žluťoučký kůň. Łódź! Привет, как дела? Γειά σου Κόσμε.",
    "東京タワーは高さ333メートルです。今天天气很好，我们去公园吧！안녕하세요 세계. สวัสดีชาวโลก",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם! नमस्ते दुनिया। বাংলা ভাষা தமிழ்",
    "🙂🚀👩‍👩‍👧‍👦 🇫🇷 é… “quotes” ‘single’ — dash – minus − ×÷≈≠ ∑∫ αβγ",
    "   leading, trailing   ",
    "\n\n \n\t\n a\u00a0b\u3000c \n",
    "CamelCaseWord HTTPServer snake_case_word __init__ x1y2z3 A.B.C. ...!!??",
    "'tis 'Twas o'clock rock'n'roll we'll WE'LL It's IT'S",
    "x",
    " x",
    "1",
)


def demand_same_tokens(gguf: Path, vocabulary: Vocabulary, *, allow: bool = False) -> list[str]:
    """The differences, a line each, between how the GGUF's vocabulary and the tokenizer.json it was made from split the
    lines of TEXT: llama.cpp's own patterns deviate from some tokenizers.

    Raises MismatchError with the first one unless `allow` is given, SteerError where llama.cpp cannot load it.
    """
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(json.dumps(vocabulary.described))
    found: list[str] = []
    with _llama_tokenizer(gguf, vocabulary.pre) as ours:
        for text in (*TEXT, "\n".join(TEXT)):
            if text.startswith(" ") and is_metaspace(vocabulary.described):
                continue  # llama.cpp, like SentencePiece itself, puts a space before this one too
            # The tokenizer may know more tokens than the model has embeddings for.
            wanted = [
                token for token in theirs.encode(text, add_special_tokens=False).ids if token < len(vocabulary.tokens)
            ]
            if difference := _difference(text, wanted, ours(text), vocabulary):
                found.append(difference)
    if found and not allow:
        raise MismatchError(
            f"{found[0]} ({len(found)} of {len(TEXT) + 1} texts differ); give the right pre-tokenizer with --pre, or "
            "--allow-other-tokens to convert it all the same: such texts will be other tokens than it was trained on"
        )
    return found


def _pass_over(_: bytes) -> None:
    """What is no error is not for the terminal."""


@contextmanager
def _llama_tokenizer(gguf: Path, pre: str) -> Iterator[Callable[[str], list[int]]]:
    import llama_cpp

    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    with llama_errors(_pass_over) as errors:
        model = llama_cpp.llama_model_load_from_file(bytes(gguf), parameters)
    if not model:
        raise SteerError(
            f"llama.cpp cannot load this vocabulary with pre-tokenizer {pre!r}, give one that it knows with --pre: "
            f"{' '.join(errors)}"
        )
    vocab = llama_cpp.llama_model_get_vocab(model)

    def tokenize(text: str) -> list[int]:
        encoded = text.encode()
        tokens = (llama_cpp.llama_token * (len(encoded) + 2))()
        count = llama_cpp.llama_tokenize(vocab, encoded, len(encoded), tokens, len(tokens), False, False)
        return list(tokens[:count])

    try:
        yield tokenize
    finally:
        llama_cpp.llama_model_free(model)


def _difference(text: str, wanted: list[int], found: list[int], vocabulary: Vocabulary) -> str:
    """Where two splits of a text first differ; empty where they do not."""
    if wanted == found:
        return ""
    place = next((i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), len(wanted))
    theirs, ours = ([vocabulary.tokens[token] for token in tokens[place : place + 3]] for tokens in (wanted, found))
    return (
        f"llama.cpp with pre-tokenizer {vocabulary.pre!r} splits text differently: expected {theirs} at token {place} "
        f"of {text[:30]!r}…, got {ours}"
    )
