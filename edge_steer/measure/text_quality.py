"""Is a text still a text: measures of generated answers.

Definitions after arXiv 2601.19375 and its code (knoveleng/steering, evaluation/quality.py and the perplexity of its
pipeline), taken as formulas:
- perplexity: exp of the mean negative log-probability of the generated tokens, prompt excluded, under the unsteered
  model. A violation is one above 2.0.
- repetition: (4-grams − distinct 4-grams) / 4-grams, over words parted by blanks; 0 for fewer than 4 words.
- language consistency: share of characters other than blanks that are ASCII or Latin.
- compression ratio: bytes of the zlib-compressed UTF-8 text over those of the text; low is repetitive.
Ours is the strict violation: a perplexity above 2.0, or a repetition above 0.3.
"""

from __future__ import annotations

import unicodedata
import zlib

MAX_PERPLEXITY = 2.0
MAX_REPETITION = 0.3


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of words that stood in the text before."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def language_consistency(text: str) -> float:
    """Share of the characters that are ASCII or Latin; 1 where there are none."""
    characters = [character for character in text if not character.isspace()]
    expected = sum(
        character.isascii() or unicodedata.name(character, "").startswith("LATIN ") for character in characters
    )
    return expected / len(characters) if characters else 1.0


def compression_ratio(text: str) -> float:
    """Compressed size over size, 1 for no text. Short texts exceed 1."""
    data = text.encode()
    return len(zlib.compress(data, 9)) / len(data) if data else 1.0


def violates(perplexity: float) -> bool:
    """A violation as the paper counts it."""
    return perplexity > MAX_PERPLEXITY


def violates_strictly(perplexity: float, repeated: float) -> bool:
    """A violation as the paper counts it, or a text that repeats itself."""
    return violates(perplexity) or repeated > MAX_REPETITION
