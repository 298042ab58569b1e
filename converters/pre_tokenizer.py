"""Which of llama.cpp's pre-tokenizers a tokenizer.json describes, told from its own `pre_tokenizer` section.

Nothing is guessed: a structure that is not in the table below has no name. The comparison of tokenizations that follows
every conversion is the proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_steer.errors import SteerError

# `'s`, `'t` and so on in either case, as llama.cpp and as Hugging Face write it.
_CONTRACTIONS = ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _split_at_capitals(end: str) -> str:
    """Words told apart where capitals begin, each with `end` behind it."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{end}|{start}{_UPPER}+{_LOWER}*{end}|"


# Pattern of the Split before a ByteLevel without its own → name where whole words are looked up before merging
# (`ignore_merges`), and where they are not.
_PATTERNS = {
    _CONTRACTIONS[1] + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL: ("llama-bpe", "dbrx"),
    _CONTRACTIONS[1] + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL: (None, "qwen2"),
    _split_at_capitals("") + r"\p{N}" + _TAIL_SLASH: ("tekken", None),
    _split_at_capitals(_CONTRACTIONS[1] + "?") + r"\p{N}{1,3}" + _TAIL_SLASH: (None, "gpt-4o"),
}


def recognise(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json; None where it is not known."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    before, own_pattern = steps[:-1], steps[-1].get("use_regex", True)
    model = tokenizer.get("model")
    whole_words = bool(isinstance(model, Mapping) and model.get("ignore_merges"))
    if own_pattern and not whole_words:
        if not before:
            return "gpt-2"
        if len(before) == 1 and before[0].get("type") == "Digits" and before[0].get("individual_digits"):
            return "smollm"
    if own_pattern or len(before) != 1 or not _keeps_matches(before[0]):
        return None
    pattern = before[0].get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if not isinstance(regex, str):
        return None
    with_lookup, without = _PATTERNS.get(regex.replace(*_CONTRACTIONS), (None, None))
    return with_lookup if whole_words else without


def _steps(section: Any) -> list[Mapping[str, Any]]:
    if not isinstance(section, Mapping):
        return []
    if section.get("type") != "Sequence":
        return [section]
    steps = section.get("pretokenizers")
    return [step for step in steps if isinstance(step, Mapping)] if isinstance(steps, list) else []


def _keeps_matches(step: Mapping[str, Any]) -> bool:
    """A Split whose matches become the words. The patterns match any text whole, so both ways to write it are one."""
    way = (step.get("behavior"), bool(step.get("invert")))
    return step.get("type") == "Split" and way in (("Isolated", False), ("Removed", True))


def choose(tokenizer: Mapping[str, Any], given: str | None) -> tuple[str, dict[str, Any] | None]:
    """`given`, or what `recognise` finds; and the `pre_tokenizer` section that stands for it where `given` overrides
    another name that the file itself goes by. Raises SteerError if there is no name."""
    found = recognise(tokenizer)
    if given is not None:
        return given, None if found in (None, given) else _section(given)
    if found is None:
        raise SteerError(
            "this tokenizer.json splits text in a way that is not known here; if llama.cpp knows it by a name, give it "
            "with --pre NAME (llama-bpe, qwen2, smollm, gpt-2, …; tokenizations are compared afterwards)"
        )
    return found, None


def _section(name: str) -> dict[str, Any] | None:
    """The `pre_tokenizer` section that `recognise` calls `name`; None for names that it does not know."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    before: dict[str, Any]
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        before = {"type": "Digits", "individual_digits": True}
    else:
        regex = next((regex for regex, names in _PATTERNS.items() if name in names), None)
        if regex is None:
            return None
        before = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        byte_level["use_regex"] = False
    return {"type": "Sequence", "pretokenizers": [before, byte_level]}
